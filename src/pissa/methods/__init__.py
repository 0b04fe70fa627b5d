"""One file per method: `ls` of this folder is the feature list. `pissa.registry.methods()` reads it."""
