"""What a method is: a function from one weight to a `Split`, with what is checked and said around it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pissa.checks import check_rank, check_scale, check_weight, tolerance_of, typed
from pissa.errors import InputError, did_you_mean
from pissa.splits import Quantised, Split, is_finite
from pissa.untyped import Json, Observed, Options

WEIGHT, QUANTISER = "weight", "quantiser"
OBSERVED = ("covariance", "components", "gradient", "inputs")
"""What a method may need to have been seen of a layer while the model reads calibration rows, see `pissa.observe`."""


@dataclass(frozen=True)
class Quantisation:
    """How the frozen part is quantised.

    Attributes:
        quantise: from a matrix [out, in] in float32 to its quantised form.
        rounds: of alternation between the low-rank part and the quantised rest, 1 or more.
    """

    quantise: Callable[[Tensor], Quantised]
    rounds: int = 1


@dataclass(frozen=True)
class Allotment:
    """How a method gives each layer a rank of its own: a pass over all layers, then one decision.

    Attributes:
        score: ``(weight, observed, rank, **options)`` to a vector; all that is kept of a layer
            until the decision.
        allot: ``(scores by tensor name, rank, **options)`` to ranks by tensor name; 0 leaves a
            layer alone.
    """

    score: Callable[..., Tensor]
    allot: Callable[..., dict[str, int]]


Brought = Callable[..., Any] | str
"""A function, or where to find one that needs more than torch: "pissa.training.lora_pro:LoraPro"."""


@dataclass(frozen=True)
class Method:
    """A way to split a weight, and what the tables say about it; see `method` for the fields."""

    name: str
    title: str
    paper: str
    trains: str
    verdict: str
    start: Callable[..., Split]
    parts: tuple[str, ...] = ("left", "right")
    zero_start: bool = False
    needs: str = WEIGHT
    full_rank: bool = False
    allotment: Allotment | None = None
    entries: Callable[..., int] | None = None
    optimizer: Brought | None = None
    schedule: Brought | None = None

    @property
    def alternates(self) -> bool:
        """Whether the low-rank part follows the error of a quantised rest: its function asks for the quantiser."""
        return "quantisation" in inspect.signature(self.start).parameters

    @property
    def observes(self) -> str | None:
        """What must have been seen of each layer, of `OBSERVED`; None where weights suffice."""
        return self.needs if self.needs in OBSERVED else None

    def rank_at(self, rank: int, shape: tuple[int, ...], name: str) -> int:
        """The rank that a weight [out, in] of this shape is split at where `rank` is asked, checked."""
        check_rank(min(rank, *shape) if self.full_rank else rank, shape, name)
        return min(shape) if self.full_rank else rank

    @property
    def exports(self) -> str:
        """What a trained adapter becomes for other tools, in words."""
        if not self.parts:
            return "merged weights"
        if self.needs == QUANTISER:
            return "plain LoRA of rank r for its own residual"
        if self.full_rank:
            return "merged weights, or the best LoRA of a rank"
        return (
            f"plain LoRA of rank {'r' if self.zero_start or 'core' in self.parts else '2r'}, exact"
        )

    @property
    def options(self) -> Json:
        """The method's own settings with their defaults: what its function takes beyond what all take."""
        common = {"scale", "svd", "seed", "name", "quantisation", *OBSERVED}
        parameters = inspect.signature(self.start).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in common
        }

    def checked(self, options: Options | None) -> Json:
        """All options, the given ones in their types (also from a command line's words), the others
        by default.

        Raises:
            InputError: an unknown name or value, with those that are known.
        """
        own, hints = self.options, typing.get_type_hints(self.start)
        if options is not None and not isinstance(options, Mapping):
            raise InputError(
                f"options are {options!r}, expected names with values, as {{'mode': 'kpm'}}"
            )
        for name in options or {}:
            if name not in own:
                known = ", ".join(own) or "none"
                raise InputError(
                    f"{self.name} has no option {name!r}.{did_you_mean(name, list(own))} Known: {known}"
                )
        return own | {
            name: typed(hints[name], value, f"{self.name}: {name}")
            for name, value in (options or {}).items()
        }

    def start_shapes(
        self, rank: int, shape: tuple[int, int], options: Options
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of what a start consists of, by part, for a weight [out, in] of `shape`."""
        shapes: dict[str, tuple[int, ...]] = {"left": (shape[0], rank), "right": (rank, shape[1])}
        if "core" in self.parts and not self.zero_start:
            shapes["core"] = (rank, rank)
        if self.entries:
            shapes["pattern"] = (2, self.entries(rank, **options))
        return shapes

    def required(self, observed: Observed, name: str) -> Any:
        """What was observed, or an error where nothing was."""
        if observed is None:
            raise InputError(
                f"{self.name} needs the {self.needs} of `{name}`, seen while the model reads calibration rows: "
                "give --calibration DATA, or observations from pissa.observe"
            )
        if isinstance(observed, Tensor) and not is_finite(observed):
            raise InputError(
                f"the {self.needs} of `{name}` has non-finite values: look for an overflow in float16, or broken rows"
            )
        return observed

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
        observed: Observed = None,
        options: Options | None = None,
    ) -> Split:
        """Check the input, then split `weight`; factors are float32 (float64 for a float64 weight).

        Args:
            weight: [out, in], finite, float64/32/16 or bfloat16.
            rank: 1 to min(out, in); methods that work at full rank ignore it.
            scale: alpha / rank, above 0.
            svd: "fast", "exact" or a tolerance, see `pissa.linalg.truncated_svd`; methods without
                an SVD ignore it.
            seed: with `name` it fixes every random number, whatever the order of the calls.
            name: the tensor's name, for the seed and for error messages.
            quantisation: of the frozen part; None to leave it as it is.
            observed: what the method needs to have been seen, of the kind that `needs` says.
            options: the method's own, by name.

        Raises:
            InputError: naming the tensor.
        """
        check_weight(weight, name)
        rank = self.rank_at(rank, weight.shape, name)
        check_scale(scale, name)
        tolerance_of(svd)
        if self.needs == QUANTISER and quantisation is None:
            raise InputError(
                f"{self.name} starts from the error of a quantised weight: name the quantiser, --quant nf4"
            )
        settings = {"scale": scale, "svd": svd, "seed": seed, "name": name, **self.checked(options)}
        if self.observes:
            settings[self.observes] = self.required(observed, name)
        with torch.no_grad():
            if self.alternates:
                split = self.start(weight, rank, **settings, quantisation=quantisation)
            else:
                split = self.start(weight, rank, **settings)
                if quantisation:
                    split = dataclasses.replace(
                        split, quantised=quantisation.quantise(split.frozen)
                    )
        if not all(
            is_finite(part) for part in (split.left, split.core, split.right) if part is not None
        ):
            raise InputError(
                f"splitting `{name}` overflows {str(split.left.dtype).removeprefix('torch.')}: its largest value is "
                f"{float(weight.abs().max()):.3g} and alpha / rank is {scale:.3g}; look for a damaged checkpoint"
            )
        if self.zero_start and all(
            part is None or part.any() for part in (split.left, split.core, split.right)
        ):
            raise InputError(
                f"{self.name} says zero_start=True, but its start of `{name}` is not zero: return a "
                "left factor, a core or a right factor of zeros, or leave zero_start out"
            )
        return split


def brought(found: Brought) -> Callable[..., Any]:
    """The function itself, imported now where a method only says where it is."""
    if not isinstance(found, str):
        return found
    module, _, name = found.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
