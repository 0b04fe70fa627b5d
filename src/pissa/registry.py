"""The table of methods: `@method` puts a function into it, `get` takes it out again.

A method is a function from one weight to a `Split`. The decorator checks the input once, so that a method file
holds nothing but its formula.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa.errors import InputError, did_you_mean
from pissa.randomness import random_control, tensor_seed
from pissa.splits import Quantised, Split, is_finite

EXACT, LEAST_TOLERANCE = 1e-5, 5e-6
"""What svd="exact" certifies, for singular values and energy; and the least that float32 can."""
QUANTISER = "quantiser"
CONTROL = "-control"
"""After a method's name: its start along random directions."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantisation:
    """How the frozen part is quantised.

    Attributes:
        quantise: from a matrix [out, in] in float32 to its quantised form.
        rounds: of alternation between the low-rank part and the quantised rest, 1 or more.
        closing: whether the last round ends with the low-rank part; the authors of PiSSA leave that out.
    """

    quantise: Callable[[Tensor], Quantised]
    rounds: int = 1
    closing: bool = True


@dataclass(frozen=True)
class Method:
    """A way to split a weight, and what the tables say about it."""

    name: str
    title: str
    paper: str
    trains: str
    verdict: str
    start: Callable[..., Split]
    zero_start: bool = False
    alternates: bool = False
    needs: str = "weight"

    def split(
        self,
        weight: Tensor,
        rank: int,
        *,
        scale: float = 1.0,
        svd: str | float = "exact",
        seed: int = 0,
        name: str = "weight",
        quantisation: Quantisation | None = None,
    ) -> Split:
        """Check the input, then split `weight`; factors are float32 (float64 for a float64 weight).

        Args:
            weight: [out, in], finite, float64/32/16 or bfloat16.
            rank: 1 to min(out, in).
            scale: alpha / rank, above 0.
            svd: "fast", "exact" or a tolerance, see `pissa.linalg.truncated_svd`; methods without an SVD ignore it.
            seed: with `name` it fixes every random number, whatever the order of the calls.
            name: the tensor's name, for the seed and for error messages.
            quantisation: of the frozen part; None to leave it as it is.

        Raises:
            InputError: naming the tensor.
        """
        check_weight(weight, name)
        check_rank(rank, weight.shape, name)
        if not (scale > 0 and math.isfinite(scale)):
            raise InputError(f"scale (alpha / rank) is {scale} for `{name}`: alpha must be above 0")
        tolerance_of(svd)
        if self.needs == QUANTISER and quantisation is None:
            raise InputError(
                f"{self.name} starts from the error of a quantised weight: name the quantiser, --quant nf4"
            )
        settings = {"scale": scale, "svd": svd, "seed": seed, "name": name}
        with torch.no_grad():
            if self.alternates:
                split = self.start(weight, rank, **settings, quantisation=quantisation)
            else:
                split = self.start(weight, rank, **settings)
                if quantisation:
                    split = dataclasses.replace(split, quantised=quantisation.quantise(split.frozen))
        if not (is_finite(split.left) and is_finite(split.right)):
            raise InputError(
                f"splitting `{name}` overflows {str(split.left.dtype).removeprefix('torch.')}: its largest value is "
                f"{float(weight.abs().max()):.3g} and alpha / rank is {scale:.3g}; look for a damaged checkpoint"
            )
        return split


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    title: str,
    paper: str,
    trains: str,
    verdict: str,
    zero_start: bool = False,
    alternates: bool = False,
    needs: str = "weight",
) -> Callable[[Callable[..., Split]], Callable[..., Split]]:
    """Register the decorated function ``f(weight, rank, *, scale, svd, seed, name) -> Split`` as a method.

    Args:
        name: what users type.
        title: the full name.
        paper: arXiv id.
        trains: which part of the weight trains, in words.
        verdict: when to take it and when not, one sentence.
        zero_start: whether left @ right is zero at first (nothing is taken out of the weight).
        alternates: whether the low-rank part follows the error of a quantised rest; the function then takes
            ``quantisation`` too, a `Quantisation` or None.
        needs: "weight", or "quantiser" where there is no start without one.
    """

    def register(start: Callable[..., Split]) -> Callable[..., Split]:
        _METHODS[name] = Method(name, title, paper, trains, verdict, start, zero_start, alternates, needs)
        return start

    return register


def methods() -> dict[str, Method]:
    """All methods by name, read from the folder `pissa/methods`."""
    package = importlib.import_module("pissa.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_METHODS.items()))


def get(name: str) -> Method:
    """The method of that name, or an error with the nearest one; `NAME-control` is the random control of NAME."""
    known = methods()
    if name.endswith(CONTROL) and name.removesuffix(CONTROL) in known:
        return _control(known[name.removesuffix(CONTROL)])
    if name not in known:
        names = sorted({*known, *PRESETS})
        raise InputError(f"unknown method {name!r}.{did_you_mean(name.lower(), names)} Known: {', '.join(names)}")
    return known[name]


def _control(studied: Method) -> Method:
    """The method whose start is `studied`'s along random directions, see `pissa.randomness.random_control`."""
    if studied.needs == QUANTISER:
        raise InputError(f"{studied.name} starts from the error of a quantised weight and has no random control")

    def start(weight: Tensor, rank: int, *, seed: int, name: str, **settings: Any) -> Split:
        unquantised = {"quantisation": None} if studied.alternates else {}
        split = studied.start(weight, rank, seed=seed, name=name, **settings, **unquantised)
        return random_control(split, tensor_seed(seed, f"{name}{CONTROL}"))

    return dataclasses.replace(
        studied,
        name=studied.name + CONTROL,
        title=f"random control of {studied.title}",
        trains="random directions of the same norms",
        verdict="a yardstick: what it reaches too is owed to the size of the start, not to its directions",
        start=start,
        alternates=False,
    )


@dataclass(frozen=True)
class Choice:
    """A method with its quantiser, as asked for or by a preset's name.

    Attributes:
        method: a name listed by `pissa methods`.
        quant: a quantiser's name, or None.
        iterations: rounds of alternation; 1 where the method does not alternate.
    """

    method: str
    quant: str | None = None
    iterations: int = 1


PRESETS = {"qlora": ("lora", "nf4"), "loftq": ("loftq", "nf4"), "qpissa": ("pissa", "nf4")}
"""Names for a method with a quantiser."""
ITERATIONS = 5
"""Rounds of the methods that alternate, as in the scripts of PiSSA and LoftQ."""


def choose(method: str, quant: str | None = None, iterations: int | None = None, double_quant: bool = False) -> Choice:
    """Resolve a method or preset; `quant` wins over the preset's own.

    Raises:
        InputError: unknown, or a combination without a meaning.
    """
    method, preset_quant = PRESETS.get(method, (method, None))
    quant, alternates = quant or preset_quant, get(method).alternates
    if quant is None and double_quant:
        raise InputError("double_quant has a meaning only with a quantiser: add --quant nf4")
    if quant is None and iterations is not None:
        raise InputError(f"iterations is {iterations}, which has a meaning only with a quantiser: add --quant nf4")
    if iterations is not None and iterations < 1:
        raise InputError(f"iterations is {iterations}, expected 1 or more")
    if not alternates and iterations not in (None, 1):
        able = ", ".join(known.name for known in methods().values() if known.alternates)
        raise InputError(
            f"iterations is {iterations} with {method}, whose factors do not follow the error of the quantised part: "
            f"leave it out, or use one of {able}"
        )
    return Choice(method, quant, (iterations or ITERATIONS) if alternates and quant else 1)


def scale_of(alpha: float | None, rank: int) -> float:
    """``alpha / rank``; 1 when no alpha is given."""
    if alpha is None:
        return 1.0
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"alpha is {alpha}, expected a number above 0: use --alpha {rank} for a scale of 1")
    return alpha / rank


def tolerance_of(svd: str | float) -> float | None:
    """The tolerance that a decomposition has to certify; None for "fast".

    Raises:
        InputError: neither "fast" nor "exact" nor a number from 5e-6 to 1.
    """
    if svd in ("fast", "exact"):
        return None if svd == "fast" else EXACT
    try:
        tolerance = float(svd)
    except (TypeError, ValueError):
        tolerance = math.nan
    if not LEAST_TOLERANCE <= tolerance <= 1:
        raise InputError(f"svd is {svd!r}, expected 'fast', 'exact' or a tolerance from {LEAST_TOLERANCE:g} to 1")
    return tolerance


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse what cannot be split: wrong dimensions, dtype, device or values."""
    if weight.is_meta:
        raise InputError(f"`{name}` is on the meta device and has no values: load the model's weights first")
    if weight.dtype not in FLOATS:
        raise InputError(
            f"`{name}` has dtype {weight.dtype}, expected float32, bfloat16, float16 or float64. "
            "A quantised weight must be decomposed before it is quantised: start from the 16-bit model"
        )
    if weight.ndim != 2:
        raise InputError(f"`{name}` has shape {list(weight.shape)}, expected a matrix [out, in]")
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(f"`{name}` has {bad} non-finite values (NaN or Inf): the checkpoint is damaged")


def check_rank(rank: int, shape: torch.Size | tuple[int, ...], name: str) -> None:
    """Refuse a rank that is not from 1 to min(shape)."""
    if rank < 1:
        raise InputError(f"rank {rank} is below 1 for `{name}`: use --rank 1 or more")
    if rank > min(shape):
        raise InputError(
            f"rank {rank} is larger than min(out, in) = {min(shape)} of `{name}` {list(shape)}: "
            f"use --rank {min(shape)} or leave it out of --targets"
        )
