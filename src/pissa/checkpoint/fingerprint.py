"""What makes a base model the same base model: a digest of every tensor.

A tensor is recorded in its own dtype and in the narrower ones it may be loaded in (float32 also as
bfloat16 and float16), so that a base stored in float32 is recognised when it is loaded in bfloat16,
and the other way round. Names are those of the base without the task head's prefix
(`model.layers.0...` and `layers.0...` are one name).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pissa.checkpoint.targets import is_quantised, plain_modules
from pissa.errors import InputError, WrongBaseError

NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.float16,),
    torch.float16: (torch.bfloat16,),
}
PIECE = 2**22
"""Entries that are cast and hashed at a time."""
Digests = dict[str, str]
"""dtype name to SHA-256 of the tensor's shape and bytes in that dtype; the first is the tensor's own."""


def tensor_digest(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of shape and bytes, as if the tensor were of `dtype`; a piece of it is copied at a time."""
    digest = hashlib.sha256(str(list(tensor.shape)).encode())
    for piece in torch.split(tensor.detach().reshape(-1), PIECE):
        digest.update(
            piece.to("cpu", dtype or tensor.dtype).contiguous().view(torch.uint8).numpy().data
        )
    return digest.hexdigest()


def tensor_digests(tensor: Tensor) -> Digests:
    """The digest in the tensor's own dtype, then in each narrower one."""
    dtypes = (tensor.dtype, *NARROWER.get(tensor.dtype, ()))
    return {_name(dtype): tensor_digest(tensor, dtype) for dtype in dtypes}


def model_tensors(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, Tensor]:
    """The base's parameters under their canonical names; tied ones once, those of adapters not at
    all.

    Args:
        model: a plain model, or one whose layers are wrapped by adapters that leave the base as it
            is. Quantised layers give their parts, as files hold them.
        skip: modules whose parameters are not part of the base (a new head).
    """
    skipped = tuple(f"{name}." for name in skip)
    prefix = getattr(model, "base_model_prefix", "")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module_name, module in plain_modules(model).items():
        own = dict(module.named_parameters(recurse=False))
        shared = {key for key, parameter in own.items() if id(parameter) in seen}
        seen |= {id(parameter) for parameter in own.values()}
        if is_quantised(module):
            _refuse_repacked(module_name, module)
            own = module.state_dict()  # all parts of the weight, in the order of files
        for key, parameter in own.items():
            name = f"{module_name}.{key}" if module_name else key
            if key not in shared and not name.startswith(skipped):
                tensors[canonical(name, prefix)] = parameter.data
    return tensors


def _refuse_repacked(name: str, module: nn.Module) -> None:
    """On some processors bitsandbytes rounds a layer's scales at its first forward without gradients."""
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise InputError(
            f"`{name}` has been run, and bitsandbytes has repacked it for this processor, so that it can no longer be "
            "compared with its file: load the model anew, and put the adapter on it before it runs"
        )


def canonical(name: str, base_model_prefix: str) -> str:
    """The tensor's name without the prefix that only a model with a head has."""
    return name.removeprefix(f"{base_model_prefix}.") if base_model_prefix else name


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, Digests]:
    """The digests of all tensors, hashed side by side (hashing releases the interpreter)."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(tensors, pool.map(tensor_digests, tensors.values()), strict=True))


def combined(digests: Mapping[str, Digests]) -> str:
    """One digest for all, independent of order."""
    lines = sorted(f"{name} {next(iter(entry.values()))}" for name, entry in digests.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_same(
    recorded: Mapping[str, Digests], read: Callable[[str], Tensor | None], *, what: str, advice: str
) -> None:
    """Compare every recorded tensor with the one at hand.

    Args:
        recorded: from `fingerprint`.
        read: the tensor of a canonical name, or None.
        what: the thing that was made for the recorded base, for the message.
        advice: what to do.

    Raises:
        WrongBaseError: naming the first differing tensor, both digests and what to do.
    """
    for name, digests in recorded.items():
        tensor = read(name)
        if tensor is None:
            raise WrongBaseError(
                f"{what} was made for another base: tensor `{name}` is absent from this one. {advice}"
            )
        check_tensor(name, digests, tensor, what=what, advice=advice)


def check_tensor(name: str, recorded: Digests, tensor: Tensor, *, what: str, advice: str) -> None:
    """Compare one tensor with its record, in the narrowest dtype that either went through."""
    own = next(iter(recorded))
    at_hand = _name(tensor.dtype)
    if at_hand in recorded:
        got = tensor_digest(tensor)
    elif own in map(_name, NARROWER.get(tensor.dtype, ())):
        at_hand = own
        got = tensor_digest(tensor, getattr(torch, own))
    else:
        raise WrongBaseError(
            f"{what} was made on `{name}` in {own}; it is {at_hand} here and cannot be compared. Load the base in {own}"
        )
    if got != recorded[at_hand] and not _is_widened(tensor, recorded):
        raise WrongBaseError(
            f"{what} was made for another base: `{name}` {list(tensor.shape)} has digest {got[:16]} here, "
            f"expected {recorded[at_hand][:16]} ({at_hand}). {advice}"
        )


def _is_widened(tensor: Tensor, recorded: Digests) -> bool:
    """Whether it is the recorded tensor rounded to a narrower dtype and widened again, as before k-bit training."""
    narrower = (tensor.detach().to(dtype) for dtype in NARROWER.get(tensor.dtype, ()))
    return any(
        torch.equal(narrow.to(tensor.dtype), tensor)
        and tensor_digest(narrow) == recorded.get(_name(narrow.dtype))
        for narrow in narrower
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
