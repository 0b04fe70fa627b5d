"""The model and the data that `pissa demo` runs on."""
