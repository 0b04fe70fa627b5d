"""What a form has to say: everything about an adapter that depends on how it lives on a layer.

A form is chosen once, where a recipe meets its method (`pissa.adapters.adaptation`), and handed on.
The same object serves all layers of an adapter; what differs from layer to layer (the start, what
trains) lies on the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pissa.adapters import factors, sharding, starts
from pissa.adapters.storing import describe
from pissa.method import Method
from pissa.records import Layer
from pissa.splits import Factors, Lora, Split
from pissa.untyped import PeftLayer, StateDict

NO_DROPOUT = (
    "the adapter starts as a part of the weight itself, and dropping its inputs would change the "
    "model before the first step"
)
PARTS_OF_A_START = ("left", "right", "core", "pattern")


@dataclass(frozen=True)
class Form(ABC):
    """How an adapter lives on a layer.

    Attributes:
        parts: which of left, core and right train.
        kinds: of layers it can live on.
        export_ranks: rank of the plain LoRA in a run's adapter/, in ranks of the adapter.
        beside_pair: parts of a start that a decomposed folder holds beside the stock pair.
        undivided: launchers under which it cannot train, since they never show a factor whole.
        trained_prefix: in a state file, of the names of what trains.
    """

    parts: tuple[str, ...]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d", "embedding", "conv2d")
    export_ranks: ClassVar[int] = 1
    beside_pair: ClassVar[tuple[str, ...]] = ()
    undivided: ClassVar[tuple[str, ...]] = ()
    trained_prefix: ClassVar[str] = ""

    @staticmethod
    @abstractmethod
    def fits(method: Method, base: str, quantized: bool) -> bool:
        """Whether this is the form of what the method trains, see `form_of`."""

    @property
    def state_dict_ranks(self) -> int:
        """Rank of the pair that leaves by a state dict, in ranks of the adapter."""
        return self.export_ranks

    # On a live layer.

    def install(self, layer: PeftLayer, adapter: str, start: Factors, *, split: bool) -> None:
        """Give one adapter of a layer this form and this start, so that the first step is the base.

        Args:
            layer: a peft layer that has the adapter at the start's rank.
            adapter: its name.
            start: what was taken out of the weight, or is put beside it.
            split: the layer's weight is what the start left of it already.
        """
        self.begin(layer, adapter, start)

    @abstractmethod
    def begin(self, layer: PeftLayer, adapter: str, start: Factors) -> None:
        """Put an adapter at a start, and leave the layer's weight alone."""

    @abstractmethod
    def trained(self, layer: PeftLayer, adapter: str) -> Factors:
        """What trains: the adapter's own parameters, as matrices."""

    def assign(self, layer: PeftLayer, adapter: str, trained: Factors) -> None:
        """Overwrite what trains."""
        own = self.trained(layer, adapter).named()
        with torch.no_grad():
            for part, value in trained.named().items():
                own[part].copy_(value)

    def begin_again(self, layer: PeftLayer, adapter: str, trained: Factors) -> None:
        """Called instead of `assign` when a training resumes from its first step.

        Only what the start does not give already is taken from the saved state.
        """

    def start(self, layer: PeftLayer, adapter: str, trained: Factors) -> Factors:
        """The start of an adapter, with what trains at hand."""
        return starts.one(layer, adapter)

    def current(self, layer: PeftLayer, adapter: str) -> tuple[Tensor, Tensor]:
        """The factors (left [out, r], right [r, in]) whose product trains, as they are now."""
        return self.trained(layer, adapter).pair

    def exact(self, layer: PeftLayer, adapter: str) -> dict[str, nn.Parameter]:
        """What a checkpoint holds beside the plain LoRA, because it comes back from that only nearly."""
        return {}

    # The state-dict hooks call these two where the right factor's key is in the state dict.

    def emit(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """Put the plain LoRA into a state dict in the place of what trains.

        Args:
            layer: the peft layer.
            adapter: its name.
            state: the state dict.
            keys: of (left, right) in it.
        """

    def take(self, layer: PeftLayer, adapter: str, state: StateDict, keys: tuple[str, str]) -> None:
        """The way back.

        Raises:
            WrongBaseError: a pair of another start.
        """

    # In files, without a model.

    @abstractmethod
    def change(self, start: Factors, trained: Factors, scale: float) -> Lora:
        """The change of the model that the adapter is served on, as a plain LoRA."""

    @abstractmethod
    def drift(self, start: Factors, trained: Factors) -> Factors:
        """The change of each part since the start; None for one that does not train."""

    def to_state(self, start: Factors, trained: Factors) -> dict[str, Tensor]:
        """What a state file holds of a layer, by name after the module's."""
        names = {f"{self.trained_prefix}{part}": value for part, value in trained.named().items()}
        return names | {f"start_{part}": value for part, value in start.named().items()}

    def from_state(self, stored: Mapping[str, Tensor]) -> tuple[Factors, Factors]:
        """(start, trained) of a layer from a state file.

        Raises:
            KeyError: the name of a tensor that is not there.
        """
        trained = Factors(**{part: stored[f"{self.trained_prefix}{part}"] for part in self.parts})
        optional = (part for part in ("core", "pattern") if f"start_{part}" in stored)
        kept = {part: stored[f"start_{part}"] for part in ("left", "right", *optional)}
        return Factors(**kept), trained

    # What others are told.

    def describe(self, name: str, split: Split, dtype: torch.dtype) -> Layer:
        """The line in `pissa.json` of a weight that is split on a live model.

        Args:
            name: of the tensor.
            split: of it.
            dtype: of the layer's weight.
        """
        return describe(name, split)

    def original_bytes(self, weight_bytes: int) -> int:
        """What is kept of a weight on the host, beside the layer."""
        return 0

    def refuse_neighbours(self, present: list[str]) -> None:
        """Refuse adapters that a model has already and that this form does not bear.

        Raises:
            InputError: naming them.
        """

    def tell_stock_tools(self, model: Any, adapter: str) -> None:
        """Make peft's config say the rank and alpha of what its `save_pretrained` writes."""

    def why_no_dropout(self, method: str) -> str | None:
        """Why inputs of the adapter must not be dropped, or None."""
        return None


def remember(layer: PeftLayer, adapter: str, form: Form) -> None:
    """Write down on a layer which form one of its adapters has."""
    if not hasattr(layer, "pissa_forms"):
        layer.pissa_forms = {}
        # In this list an adapter's entry is dropped by peft's delete_adapter.
        layer.other_param_names = (*layer.other_param_names, "pissa_forms")
        layer.register_state_dict_post_hook(_emit)
        layer.register_load_state_dict_pre_hook(_take)
    layer.pissa_forms[adapter] = form


def on_layer(layer: PeftLayer) -> dict[str, Form]:
    """The form of each adapter that was put on a layer here, by its name."""
    found: dict[str, Form] = getattr(layer, "pissa_forms", {})
    return found


def _emit(layer: PeftLayer, state: StateDict, prefix: str, metadata: Any) -> None:
    """state_dict hook: what leaves the layer is a plain LoRA."""
    for adapter, form in on_layer(layer).items():
        keys = factors.keys(layer, adapter, prefix)
        if keys[1] in state and not sharding.is_away(state[keys[1]]):
            form.emit(layer, adapter, state, keys)


def _take(layer: PeftLayer, state: StateDict, prefix: str, *args: Any) -> None:
    """load_state_dict hook: the plain LoRA of this very start is taken apart again."""
    for adapter, form in on_layer(layer).items():
        keys = factors.keys(layer, adapter, prefix)
        if keys[1] in state and not sharding.is_away(state[keys[1]]):
            form.take(layer, adapter, state, keys)
