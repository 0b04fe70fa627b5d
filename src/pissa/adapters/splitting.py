"""One weight split as a recipe says: the function `pissa.split`, and what it shares with files and models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pissa.checks import check_weight, scale_of
from pissa.errors import InputError
from pissa.method import Method, Quantisation
from pissa.observe import Observations
from pissa.presets import choose
from pissa.quant import Quantiser, quantiser
from pissa.records import Recipe
from pissa.splits import Quantised, Split
from pissa.untyped import Observed, Options


def split(
    weight: Tensor,
    method: str | Method = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    svd: str | float = "exact",
    seed: int = 0,
    name: str = "weight",
    quant: str | None = None,
    iterations: int | None = None,
    double_quant: bool = False,
    observed: Observed = None,  # a tensor or Components, as the method needs
    options: Options | None = None,  # names and values of the method's own
) -> Split:
    """Split one weight.

    Args:
        weight: [out, in], finite, float64/32/16 or bfloat16; computed in float32 (float64 stays).
        method: a name listed by `pissa methods`, a preset (qlora, loftq, qpissa), or the method
            itself.
        rank: 1 to min(out, in).
        alpha: above 0; `rank` by default, which makes the scale alpha / rank equal 1.
        svd: "exact" (certified to 1e-5), "fast" (a seeded sketch), or a tolerance for the
            certificate.
        seed: with `name` it fixes every random number.
        name: the tensor's name, for the seed and for messages.
        quant: nf4, fp4 or int8 for the frozen part; None to leave it as it is.
        iterations: rounds of alternation between the low-rank part and the quantized rest (pissa,
            loftq); 5 by default.
        double_quant: quantize the scales of the blocks too.
        observed: what the method needs to have been seen of the layer (`pissa methods` says which):
            a covariance [in, in], a gradient [out, in], rows of inputs [n, in], or
            `pissa.linalg.Components`.
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
    choice.method.rank_at(rank, weight.shape, name)
    recipe = Recipe(
        choice.method.name,
        rank,
        float(rank if alpha is None else alpha),
        svd,
        seed,
        quant=choice.quant,
        double_quant=double_quant,
        iterations=choice.iterations,
        options=choice.method.checked(options),
    )
    packer = quantizer_of(recipe)
    return split_by(recipe, choice.method, packer, weight, name, weight.dtype, observed=observed)


def split_by(
    recipe: Recipe,
    method: Method,
    packer: Quantiser | None,
    weight: Tensor,
    name: str,
    dtype: torch.dtype,
    *,
    rank: int | None = None,
    observed: Observed = None,  # as above
) -> Split:
    """Split a weight as a recipe says: the method, the quantizer, and how they take turns.

    Args:
        recipe: rank, scale and so on.
        method: that the recipe names.
        packer: the quantizer that it names, or None.
        weight: [out, in], in its own dtype.
        name: of the tensor.
        dtype: that a quantized frozen part is unpacked in.
        rank: of this weight; the recipe's by default.
        observed: what the method needs to have been seen of the layer.

    Raises:
        InputError: naming the tensor.
    """
    quantization = None
    if packer is not None:

        def quantize(matrix: Tensor) -> Quantised:
            try:
                return packer.quantise(matrix, dtype)
            except InputError as error:
                raise InputError(f"`{name}`: {error}") from error

        quantization = Quantisation(quantize, recipe.iterations)
    return method.split(
        weight,
        rank or recipe.rank,
        scale=recipe.scale,
        svd=recipe.svd,
        seed=recipe.seed,
        name=name,
        quantisation=quantization,
        observed=observed,
        options=recipe.options,
    )


def quantizer_of(recipe: Recipe) -> Quantiser | None:
    """The recipe's quantizer, if it has one."""
    return quantiser(recipe.quant, double=recipe.double_quant) if recipe.quant else None


def given_observations(
    method: Method, observations: Observations | str | Path | None
) -> Observations | None:
    """What was given, from its file if it is one.

    Raises:
        InputError: given to a method that needs none.
    """
    if observations is not None and method.observes is None:
        raise InputError(
            f"observations were given, but {method.name} needs the weights alone: leave them out"
        )
    if isinstance(observations, str | Path):
        return Observations.load(observations)
    return observations
