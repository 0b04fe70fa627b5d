"""Quantised weights in a checkpoint: which tensors take a weight's place, and what the model's config says of them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.targets import Target, kind_of
from pissa.errors import CheckpointError, InputError
from pissa.quant import Quantiser, of_config
from pissa.untyped import Json

PACKABLE = ("linear", "conv1d")
"""Kinds of layers that transformers loads in few bits."""
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "qa_outputs")
"""What transformers calls the new linear layers of another model class over the same weights; they stay whole."""


def packed_modules(packer: Quantiser, targets: Iterable[Target]) -> set[str]:
    """The modules whose weights are written in few bits; of the others is written what their codes
    stand for.

    Raises:
        InputError: there are none.
    """
    targets = list(targets)
    packed = {t.module for t in targets if t.kind in PACKABLE and packer.packs(t.matrix_shape)}
    odd = [target for target in targets if target.module not in packed]
    if not packed:
        raise InputError(
            f"no weight can be packed: `{odd[0].weight}` is {odd[0].kind} {list(odd[0].matrix_shape)}, and "
            "bitsandbytes wants linear layers with rows of whole blocks of 64, in multiples of 32: use --store 16bit"
        )
    if odd:
        warnings.warn(
            f"{len(odd)} of {len(targets)} weights are quantised but written unpacked, `{odd[0].weight}` "
            f"{list(odd[0].matrix_shape)} first: the model is the same and takes more room. bitsandbytes computes "
            "wrongly on some processors where rows are no whole blocks of 64, and not at all with embeddings",
            stacklevel=3,
        )
    return packed


def packed_names(weight: str, parts: Iterable[str]) -> dict[str, str]:
    """The tensors' names in the checkpoint for the parts of a weight, "....weight" among them.

    Args:
        weight: the weight's own name.
        parts: names in its module.
    """
    module = weight.removesuffix("weight")
    return {part: module + part for part in parts}


def quantisation_config(
    packer: Quantiser, skeleton: nn.Module, packed: Collection[str], dtype: torch.dtype
) -> Json:
    """`quantization_config` with which transformers expects exactly these modules to be quantised.

    Raises:
        InputError: transformers would take other layers for quantised; names the first.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [name for name, module in skeleton.named_modules() if kind_of(module) in PACKABLE]
    skipped = [name for name in linear if name not in packed]
    skipped += [
        head
        for head in HEADS
        if head not in skipped and all(should_convert_module(n, [head]) for n in packed)
    ]
    odd = [name for name in linear if should_convert_module(name, skipped) != (name in packed)]
    if odd:
        raise InputError(
            f"transformers tells quantised layers by the ends of their names and cannot tell `{odd[0]}` from one that "
            "stays: target both or neither, or use --store 16bit"
        )
    return packer.config(dtype, skipped)


def is_residual(config: Json) -> bool:
    """Whether a config.json is of what a decomposition left of its base."""
    note = config.get("pissa")
    return isinstance(note, dict) and note.get("kind") == "residual"


def quantiser_of_checkpoint(checkpoint: Checkpoint) -> Quantiser | None:
    """What the checkpoint's config says its weights are packed with; None for a plain one.

    Raises:
        CheckpointError: packed in a way that cannot be read here.
    """
    config = checkpoint.config.get("quantization_config")
    if not config:
        return None
    found = of_config(config)
    if found is None:
        kind, name = config.get("quant_method"), config.get("bnb_4bit_quant_type")
        raise CheckpointError(
            f"{checkpoint.name} is quantised with {kind} ({name}), expected bitsandbytes' 4 or 8 bits"
        )
    return found


class PackedWeights:
    """The quantised weights of a checkpoint, unpacked one at a time.

    Attributes:
        names: the weights' names.

    Args:
        checkpoint: any; one without quantised weights has no names here.

    Raises:
        CheckpointError: see `quantiser_of_checkpoint`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._quantiser = checkpoint, quantiser_of_checkpoint(checkpoint)
        mark = f".{self._quantiser.mark}" if self._quantiser else None
        modules = (
            name.removesuffix(mark) for name in checkpoint.tensors if mark and name.endswith(mark)
        )
        self.names = {f"{module}.weight" for module in modules}

    def parts(self, weight: str) -> dict[str, Tensor]:
        """The parts of a weight by their names in its module."""
        module = weight.removesuffix("weight")
        own = [
            name
            for name in self._checkpoint.tensors
            if name.startswith(module) and name != f"{module}bias"
        ]
        return {name.removeprefix(module): self._checkpoint.read(name) for name in own}

    def dense(self, weight: str) -> Tensor:
        """What a weight stands for, [out, in]."""
        if self._quantiser is None:
            raise CheckpointError(
                f"{self._checkpoint.name} has no weights in few bits, so none is `{weight}`"
            )
        return self._quantiser.dense(self.parts(weight))

    def weight_of(self, name: str) -> str | None:
        """The quantised weight that a tensor is a part of, if it is one."""
        if name.endswith(".bias"):
            return None
        module = name
        while module := module.rpartition(".")[0]:
            if f"{module}.weight" in self.names:
                return f"{module}.weight"
        return None
