"""What the forms share that turn the layer's weight into the residual (`pissa.adapters.residual`)."""

from __future__ import annotations

import torch

from pissa.adapters import residual
from pissa.adapters.forms.variant import Variant
from pissa.adapters.storing import store
from pissa.errors import InputError
from pissa.records import Layer
from pissa.splits import Factors, Split
from pissa.untyped import PeftLayer


class OnResidual(Variant):
    """The base holds what the start left of W; W itself is kept on the host, as the undo."""

    def install(self, layer: PeftLayer, adapter: str, start: Factors, *, split: bool) -> None:
        """Take the start out of the weight, unless that was done already."""
        self.begin(layer, adapter, start)
        residual.install(layer, adapter, split=split)

    def describe(self, name: str, split: Split, dtype: torch.dtype) -> Layer:
        """Measured on the residual as the layer holds it, rounded to its dtype."""
        return store(name, split, split.left.dtype, dtype).layer

    def original_bytes(self, weight_bytes: int) -> int:
        """All of the weight."""
        return weight_bytes

    def refuse_neighbours(self, present: list[str]) -> None:
        """Their weight would change under them."""
        if present:
            raise InputError(
                "base='residual' would change the weights under the adapters that the model has "
                f"({', '.join(present)}): attach with base='keep', or delete them first"
            )
