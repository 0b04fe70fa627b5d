"""Names for what the type checker cannot know, each with its reason.

Elsewhere `Any` stands where another library's hook, callback or keyword has no type of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
"""An object of a JSON or YAML file: what it holds is checked where it is read."""
Options = Mapping[str, Any]
"""A method's own settings by name, each of the type that its method's function says."""
Observed = Any
"""What a method needs to have been seen of a layer: a tensor, or `pissa.linalg.Components`."""
PeftLayer = Any
"""A peft layer: what it is asked for lies in attributes that peft sets while it runs."""
StateDict = dict[str, Any]
"""What torch hands to state-dict hooks: tensors, and what a module put there beside them."""
Context = Any
"""Of an autograd function: it carries what its forward pass left there."""
Tokenizer = Any
"""Of transformers, whose fast and slow tokenizers have no common type with all that is called."""
Figure = Any
"""Of matplotlib, which is an extra and imported late; axes too."""
