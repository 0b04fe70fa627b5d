"""Work on whole folders: decompose, convert, merge, inspect. Tensors stream; a model is never held whole."""

from pissa.surgery.convert import convert
from pissa.surgery.decompose import decompose
from pissa.surgery.inspection import inspect
from pissa.surgery.merge import merge

__all__ = ["convert", "decompose", "inspect", "merge"]
