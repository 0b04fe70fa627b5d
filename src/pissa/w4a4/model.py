"""The layers of a live model in 4 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from pissa.checkpoint.fingerprint import canonical
from pissa.checkpoint.targets import ALL_LINEAR, Target, find_targets
from pissa.checks import check_rank
from pissa.errors import InputError
from pissa.observe import Observations
from pissa.presets import find
from pissa.untyped import Options
from pissa.w4a4.linear import W4A4Linear

SVDQUANT = "svdquant"
KINDS = ("linear", "conv1d")
"""Of layers that can compute in 4 bits."""


def quantise_model(
    model: nn.Module,
    observations: Observations,
    rank: int = 32,
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    svd: str | float = "fast",
    seed: int = 0,
    options: Options | None = None,
) -> dict[str, W4A4Linear]:
    """Put a 4-bit layer in the place of every target, for good.

    Args:
        model: any torch model in 16 or 32 bits; its targets' weights are let go.
        observations: of what entered them in this very model.
        rank: of the branches.
        targets: see `find_targets`; linear layers and GPT-2's.
        svd: see `truncated_svd`.
        seed: fixes every random number together with the tensors' names.
        options: the method's: smoothing, rounds.

    Returns:
        The new layers by module.

    Raises:
        InputError, WrongBaseError: naming the tensor; the model is as it was.
    """
    found, method = find_targets(model, targets), find(SVDQUANT)
    check_targets(found, rank)
    prefix = getattr(model, "base_model_prefix", "")
    layers: dict[str, W4A4Linear] = {}
    for target in found:
        module: Any = model.get_submodule(target.module)
        weight, name = module.weight.detach(), canonical(target.weight, prefix)
        observations.check({name: weight})
        inputs = observations.get("inputs", name).to(weight.device)
        matrix = target.to_matrix(weight)
        split = method.split(
            matrix, rank, svd=svd, seed=seed, name=target.weight, observed=inputs, options=options
        )
        layers[target.module] = W4A4Linear.from_split(split, module.bias)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    refuse_saving(model)
    return layers


def check_targets(targets: Iterable[Target], rank: int) -> None:
    """Refuse layers that are not linear, and ranks that one of them cannot have."""
    for target in targets:
        if target.kind not in KINDS:
            raise InputError(
                f"target `{target.weight}` is of kind {target.kind}, expected {' or '.join(KINDS)}: only linear layers "
                "compute in 4 bits, leave it out of --targets"
            )
        check_rank(rank, target.matrix_shape, target.weight)


def refuse_saving(model: nn.Module) -> nn.Module:
    """The same model, whose `save_pretrained` raises: transformers would fill the 4-bit layers with random numbers."""

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise InputError(
            "transformers cannot load 4-bit layers of svdquant and would put random weights in their place: keep the "
            "folder that pissa.w4a4.svdquant writes, or write 16 bits with pissa.w4a4.export_dense"
        )

    model.save_pretrained = save_pretrained  # type: ignore[assignment]
    return model
