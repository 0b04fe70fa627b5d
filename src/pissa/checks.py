"""What every split asks of its input, whatever the method: weight, rank, scale, accuracy."""

from __future__ import annotations

import math
import typing
from typing import Any

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.splits import is_finite

EXACT, LEAST_TOLERANCE = 1e-5, 5e-6
"""What svd="exact" certifies, for singular values and energy; and the least that float32 can."""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def scale_of(alpha: float | None, rank: int) -> float:
    """``alpha / rank``; 1 when no alpha is given."""
    if alpha is None:
        return 1.0
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(
            f"alpha is {alpha}, expected a number above 0: use --alpha {rank} for a scale of 1"
        )
    return alpha / rank


def check_scale(scale: float, name: str) -> None:
    """Refuse a scale that is not a number above 0."""
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"scale (alpha / rank) is {scale} for `{name}`: alpha must be above 0")


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
        raise InputError(
            f"svd is {svd!r}, expected 'fast', 'exact' or a tolerance from {LEAST_TOLERANCE:g} to 1"
        )
    return tolerance


def check_weight(weight: Tensor, name: str) -> None:
    """Refuse what cannot be split: wrong dimensions, dtype, device or values."""
    if weight.is_meta:
        raise InputError(
            f"`{name}` is on the meta device and has no values: load the model's weights first"
        )
    if weight.dtype not in FLOATS:
        raise InputError(
            f"`{name}` has dtype {weight.dtype}, expected float32, bfloat16, float16 or float64. "
            "A quantised weight must be decomposed before it is quantised: start from the 16-bit model"
        )
    if weight.ndim != 2:
        raise InputError(f"`{name}` has shape {list(weight.shape)}, expected a matrix [out, in]")
    if not is_finite(weight):
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(
            f"`{name}` has {bad} non-finite values (NaN or Inf): the checkpoint is damaged"
        )


def check_rank(rank: int, shape: torch.Size | tuple[int, ...], name: str) -> None:
    """Refuse a rank that is not from 1 to min(shape)."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise InputError(f"rank is {rank!r} for `{name}`, expected a whole number")
    if rank < 1:
        raise InputError(f"rank {rank} is below 1 for `{name}`: use --rank 1 or more")
    if rank > min(shape):
        raise InputError(
            f"rank {rank} is larger than min(out, in) = {min(shape)} of `{name}` {list(shape)}: "
            f"use --rank {min(shape)} or leave it out of --targets"
        )


def chosen_device(device: str | None) -> torch.device:
    """The device that is meant: cpu, cuda, cuda:1; by default cuda where there is one.

    Raises:
        InputError: no such device here.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device is {device!r}, expected cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, and torch sees no CUDA device here: use cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {device!r}, expected one of the {torch.cuda.device_count()} that are here"
        )
    return found


def typed(kind: Any, value: Any, what: str) -> Any:
    """`value` as an annotation says, also from the words of a command line.

    Args:
        kind: a Literal, or one of bool, int, float and str.
        value: what was given.
        what: its name, for the message.
    """
    choices = typing.get_args(kind)
    if choices:
        if value not in choices:
            raise InputError(f"{what} is {value!r}, expected one of {', '.join(map(str, choices))}")
        return value
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    try:
        if kind is bool or isinstance(value, bool) or (kind is int and int(value) != float(value)):
            raise ValueError
        found = kind(value)
        if kind is float and not math.isfinite(found):
            raise ValueError
        return found
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} is {value!r}, expected {_KINDS.get(kind, kind.__name__)}"
        ) from error
