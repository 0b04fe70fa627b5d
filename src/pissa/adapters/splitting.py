"""One weight split as a recipe says: the method, the quantiser, and how they take turns. `pissa.split` is here."""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.checks import check_rank, check_weight, scale_of
from pissa.errors import InputError
from pissa.presets import choose
from pissa.quant import Quantiser, quantiser
from pissa.records import Recipe
from pissa.registry import Quantisation, get
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
    check_rank(rank, weight.shape, name)
    recipe = Recipe(
        choice.method,
        rank,
        float(rank if alpha is None else alpha),
        svd,
        seed,
        quant=choice.quant,
        double_quant=double_quant,
        iterations=choice.iterations,
    )
    return split_by(recipe, weight, name, weight.dtype)


def split_by(recipe: Recipe, weight: Tensor, name: str, dtype: torch.dtype) -> Split:
    """Split a weight [out, in] as the recipe says.

    Args:
        recipe: method, rank, scale, and the quantiser if there is one.
        weight: in its own dtype.
        name: of the tensor.
        dtype: that a quantised frozen part is unpacked in.
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
        recipe.rank,
        scale=recipe.scale,
        svd=recipe.svd,
        seed=recipe.seed,
        name=name,
        quantisation=quantisation,
    )


def quantiser_of(recipe: Recipe) -> Quantiser | None:
    """The recipe's quantiser, if it has one."""
    return quantiser(recipe.quant, double=recipe.double_quant) if recipe.quant else None
