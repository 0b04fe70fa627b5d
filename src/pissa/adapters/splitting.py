"""One weight split as a recipe says: the method, the quantiser, and how they take turns. `pissa.split` is here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoint.targets import Target
from pissa.checks import check_weight, scale_of
from pissa.errors import InputError
from pissa.observe import Observations
from pissa.presets import choose, observed
from pissa.quant import Quantiser, quantiser
from pissa.records import Recipe
from pissa.registry import Method, Quantisation, get
from pissa.splits import Quantised, Split


def split(
    weight: Tensor,
    method: str = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    svd: str | float = "exact",
    seed: int = 0,
    name: str = "weight",
    quant: str | None = None,
    iterations: int | None = None,
    double_quant: bool = False,
    observed: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Split:
    """Split one weight.

    Args:
        weight: [out, in], finite, float64/32/16 or bfloat16; computed in float32 (float64 stays).
        method: a name listed by `pissa methods`, or a preset: qlora, loftq, qpissa.
        rank: 1 to min(out, in).
        alpha: above 0; `rank` by default, which makes the scale alpha / rank equal 1.
        svd: "exact" (certified to 1e-5), "fast" (a seeded sketch), or a tolerance for the certificate.
        seed: with `name` it fixes every random number.
        name: the tensor's name, for the seed and for messages.
        quant: nf4, fp4 or int8 for the frozen part; None to leave it as it is.
        iterations: rounds of alternation between the low-rank part and the quantised rest (pissa, loftq); 5 by default.
        double_quant: quantise the scales of the blocks too.
        observed: what the method needs to have been seen of the layer (`pissa methods` says which): a covariance
            [in, in], a gradient [out, in], rows of inputs [n, in], or `pissa.linalg.Components`.
        options: the method's own, by name.

    Raises:
        InputError: naming the tensor.

    Example:
        >>> import torch, pissa
        >>> s = pissa.split(torch.eye(4), method="pissa", rank=2)
        >>> bool(torch.allclose(s.rebuild(), torch.eye(4)))
        True
    """
    choice = choose(method, quant, iterations, double_quant)
    scale_of(alpha, rank)
    check_weight(weight, name)
    get(choice.method).rank_at(rank, weight.shape, name)
    recipe = Recipe(
        choice.method,
        rank,
        float(rank if alpha is None else alpha),
        svd,
        seed,
        quant=choice.quant,
        double_quant=double_quant,
        iterations=choice.iterations,
        options=get(choice.method).checked(options),
    )
    return split_by(recipe, weight, name, weight.dtype, observed=observed)


def split_by(
    recipe: Recipe, weight: Tensor, name: str, dtype: torch.dtype, *, rank: int | None = None, observed: Any = None
) -> Split:
    """Split a weight [out, in] as the recipe says.

    Args:
        recipe: method, rank, scale, and the quantiser if there is one.
        weight: in its own dtype.
        name: of the tensor.
        dtype: that a quantised frozen part is unpacked in.
        rank: of this weight; the recipe's by default.
        observed: what the method needs to have been seen of the layer.
    """
    quantisation = None
    packer = quantiser_of(recipe)

    def quantise(matrix: Tensor) -> Quantised:
        assert packer is not None
        try:
            return packer.quantise(matrix, dtype)
        except InputError as error:
            raise InputError(f"`{name}`: {error}") from error

    if packer:
        quantisation = Quantisation(quantise, recipe.iterations)
    return get(recipe.method).split(
        weight,
        rank or recipe.rank,
        scale=recipe.scale,
        svd=recipe.svd,
        seed=recipe.seed,
        name=name,
        quantisation=quantisation,
        observed=observed,
        options=recipe.options,
    )


def allotted(recipe: Recipe, weights: Iterable[tuple[Target, Tensor]], seen: Callable[[Target], Any]) -> Recipe:
    """The recipe with a rank for each target where its method gives layers ranks of their own.

    Args:
        recipe: with its targets.
        weights: each target with its weight [out, in]; read once, and only where the method looks at all layers.
        seen: what the method needs to have been seen of a target, see `Method.needs`.

    Returns:
        The recipe; targets that got no rank are left out of it.

    Raises:
        InputError: no target got a rank.
    """
    chosen = get(recipe.method)
    if chosen.allotment is None:
        return recipe
    modules, scores = {}, {}
    for target, weight in weights:
        modules[target.weight] = target.module
        scores[target.weight] = chosen.allotment.score(weight, seen(target), recipe.rank, **recipe.options)
    given = chosen.allotment.allot(scores, recipe.rank, **recipe.options)
    ranks = {modules[name]: rank for name, rank in given.items() if rank}
    if not ranks:
        raise InputError(f"{recipe.method} gives no layer a rank: use a larger --rank")
    return dataclasses.replace(
        recipe, ranks=ranks, targets={module: kind for module, kind in recipe.targets.items() if module in ranks}
    )


def at_full_rank(recipe: Recipe, targets: Iterable[Target]) -> Recipe:
    """The recipe with the rank of each target where its method works at full rank, whatever is asked."""
    if not get(recipe.method).full_rank:
        return recipe
    return dataclasses.replace(recipe, ranks={target.module: min(target.matrix_shape) for target in targets})


def refuse_unfit_targets(chosen: Method, targets: list[Target]) -> None:
    """Refuse a method that trains nothing, and kinds of layers that a core does not fit in."""
    if not chosen.parts:
        raise InputError(
            f"{chosen.name} trains nothing, it makes a model smaller: use pissa decompose --method {chosen.name}, or "
            "pissa.w4a4.svdquant"
        )
    odd = next((target for target in targets if target.kind not in ("linear", "conv1d")), None)
    if chosen.has_core and odd:
        raise InputError(
            f"{chosen.name} puts a core into linear layers, and `{odd.module}` is of kind {odd.kind}: leave it out of "
            "targets"
        )


def given_observations(method: str, observations: Observations | str | Path | None) -> Observations | None:
    """What was given, from its file if it is one.

    Raises:
        InputError: given to a method that needs none.
    """
    if observations is not None and observed(method) is None:
        raise InputError(f"observations were given, but {method} needs the weights alone: leave them out")
    return Observations.load(observations) if isinstance(observations, str | Path) else observations


def seen_of(observations: Observations | None, method: str, name: str) -> Any:
    """What the method needs to have been seen of a weight, by its canonical name; None where it needs nothing."""
    needs = observed(method)
    return get(method).required(observations, name).get(needs, name) if needs else None


def quantiser_of(recipe: Recipe) -> Quantiser | None:
    """The recipe's quantiser, if it has one."""
    return quantiser(recipe.quant, double=recipe.double_quant) if recipe.quant else None
