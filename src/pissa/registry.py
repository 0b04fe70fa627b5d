"""The table of methods: `@method` puts a function into it, `get` takes it out again."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pissa.errors import InputError, did_you_mean
from pissa.method import QUANTISER, WEIGHT, Allotment, Brought, Method
from pissa.randomness import random_control, tensor_seed
from pissa.splits import Split

CONTROL = "-control"
"""After a method's name: its start along random directions."""
PRESETS = {"qlora": ("lora", "nf4"), "loftq": ("loftq", "nf4"), "qpissa": ("pissa", "nf4")}
"""Names for a method with a quantiser."""

_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    title: str,
    paper: str,
    trains: str,
    verdict: str,
    parts: tuple[str, ...] = ("left", "right"),
    zero_start: bool = False,
    needs: str = WEIGHT,
    full_rank: bool = False,
    allotment: Allotment | None = None,
    entries: Callable[..., int] | None = None,
    optimizer: Brought | None = None,
    schedule: Brought | None = None,
) -> Callable[[Callable[..., Split]], Callable[..., Split]]:
    """Register the decorated function ``f(weight, rank, *, scale, svd, seed, name) -> Split`` as a
    method.

    Further keyword arguments with defaults are the method's own options, which users give by name.

    Args:
        name: what users type.
        title: the full name.
        paper: arXiv id.
        trains: which part of the weight trains, in words.
        verdict: when to take it and when not, one sentence.
        parts: which of "left", "core" and "right" train.
        zero_start: whether left @ core @ right is zero at first (nothing is taken out of the
            weight).
        needs: "weight"; "quantiser" where there is no start without one; or one of `OBSERVED`,
            which the function then takes under that name.
        full_rank: whether the factors always have min(out, in) columns and rows, whatever rank is
            asked.
        allotment: where layers get ranks of their own.
        entries: ``(k, **options)`` to how many entries of a core [k, k] train; None for all.
        optimizer: ``(model, learning_rate, *, weight_decay, **options)`` to a torch optimizer in
            the place of AdamW.
        schedule: ``(model, **options)`` to a transformers callback that goes beside the steps.

    A function that asks for ``quantisation`` (a `Quantisation` or None) lets its low-rank part
    follow the error of a quantised rest.
    """

    def register(start: Callable[..., Split]) -> Callable[..., Split]:
        facts = parts, zero_start, needs, full_rank, allotment, entries, optimizer, schedule
        _METHODS[name] = Method(name, title, paper, trains, verdict, start, *facts)
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
        raise InputError(
            f"unknown method {name!r}.{did_you_mean(name.lower(), names)} Known: {', '.join(names)}"
        )
    return known[name]


def _control(studied: Method) -> Method:
    """The method whose start is `studied`'s along random directions, see `pissa.randomness.random_control`."""
    if studied.needs == QUANTISER or not studied.parts:
        raise InputError(
            f"{studied.name} starts from the error of a quantised weight and has no random control"
        )

    @functools.wraps(studied.start)
    def start(weight: Tensor, rank: int, *, seed: int, name: str, **settings: Any) -> Split:
        unquantised = {"quantisation": None} if studied.alternates else {}
        split = studied.start(weight, rank, seed=seed, name=name, **settings, **unquantised)
        return random_control(split, tensor_seed(seed, f"{name}{CONTROL}"))

    own = inspect.signature(studied.start)
    asked = [parameter for parameter in own.parameters.values() if parameter.name != "quantisation"]
    start.__signature__ = own.replace(parameters=asked)  # type: ignore[attr-defined]

    return dataclasses.replace(
        studied,
        name=studied.name + CONTROL,
        title=f"random control of {studied.title}",
        trains="random directions of the same norms",
        verdict="a yardstick: what it reaches too is owed to the size of the start, not to its directions",
        start=start,
    )
