"""Work on whole folders: decompose, convert, merge, inspect. Tensors stream; a model is never held whole."""
