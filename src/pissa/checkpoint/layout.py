"""What a safetensors checkpoint looks like on disk: file names, dtypes, and the header of a file."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pissa.errors import CheckpointError, InputError
from pissa.untyped import Json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

Spec = tuple[torch.dtype, tuple[int, ...]]
Plan = Mapping[str, Spec]


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `shard` is the name of the file it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in their order on disk, from its header alone.

    A file is 8 bytes of header length (little endian), a JSON header, and the data; the offsets of
    the tensors must cover the data without gap or overlap.

    Raises:
        CheckpointError: The file is truncated, or its header is not true of it.
    """
    try:
        header, data_bytes = _read_json_header(path)
        entries = [
            (name, *_check_entry(name, entry))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        entries.sort(key=lambda entry: entry[3:])
        end = 0
        for name, _, _, begin, stop in entries:
            if begin != end:
                raise ValueError(
                    f"{name!r} begins at byte {begin} of the data, expected {end}, where the one before ends"
                )
            end = stop
        if end != data_bytes:
            cause = "it was cut off" if end > data_bytes else "something was added"
            raise ValueError(f"{data_bytes} bytes of data, expected {end}: {cause}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged or not safetensors ({error}): download or write it again"
        ) from error
    return {
        name: TensorInfo(dtype, shape, stop - begin, path.name)
        for name, dtype, shape, begin, stop in entries
    }


def make_header(
    plan: Plan, metadata: Mapping[str, str], last: Container[str] = (), room: int = 0
) -> tuple[bytes, dict[str, int]]:
    """The bytes that come before the data, and where in the file each tensor begins.

    Args:
        plan: Dtype and shape of every tensor.
        metadata: Strings for the header.
        last: Names of tensors that come after all others.
        room: Least number of bytes; the header is filled up with spaces.

    Raises:
        InputError: A dtype or name that safetensors cannot hold.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    # Wide dtypes first: every tensor then begins at a multiple of its item size, which a memory map
    # wants.
    for name, (dtype, shape) in sorted(
        plan.items(), key=lambda item: (item[0] in last, -item[1][0].itemsize)
    ):
        if name == "__metadata__" or dtype not in _NAME_OF:
            raise InputError(
                f"{name!r} of {dtype} does not fit safetensors: use a plain name, and float32 or the like"
            )
        begins[name], end = end, end + count_bytes(dtype, shape)
        entries[name] = {
            "dtype": _NAME_OF[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], end],
        }
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    header = header.ljust(room - 8)
    header += b" " * (-len(header) % 8)
    before = len(header).to_bytes(8, "little") + header
    return before, {name: begin + len(before) for name, begin in begins.items()}


def count_bytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Size of a tensor's data."""
    return math.prod(shape) * dtype.itemsize


def plan_bytes(plan: Plan) -> int:
    """Size of the data of all tensors of a plan, less headers."""
    return sum(count_bytes(dtype, shape) for dtype, shape in plan.values())


def _read_json_header(path: Path) -> tuple[Json, int]:
    """The header as it stands, and how many bytes of data follow it."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        if file_bytes < 8:
            raise ValueError(f"{file_bytes} bytes, expected at least the 8 of the header length")
        header_bytes = int.from_bytes(file.read(8), "little")
        # Checked before the read, so that a lying length cannot make us allocate it.
        limit = min(MAX_HEADER_BYTES, file_bytes - 8)
        if not 0 < header_bytes <= limit:
            raise ValueError(
                f"header length {header_bytes}, expected 1 to {limit} in a file of {file_bytes} bytes"
            )
        header = json.loads(
            file.read(header_bytes).decode("utf-8"), object_pairs_hook=_without_duplicates
        )
    if not isinstance(header, dict):
        raise ValueError(f"the header is a JSON {type(header).__name__}, expected an object")
    return header, file_bytes - 8 - header_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    entries: Json = {}
    for name, entry in pairs:
        if name in entries:  # JSON parsers differ in which of the two they keep
            raise ValueError(f"the header has {name!r} twice")
        entries[name] = entry
    return entries


def _check_entry(name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and byte after the last of one tensor."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name!r} is {entry!r:.60}, expected dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"{name!r} has dtype {entry['dtype']!r:.60}, expected one of {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape):
        raise ValueError(f"{name!r} has shape {shape!r:.60}, expected whole numbers of at least 0")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{name!r} has data_offsets {offsets!r:.60}, expected two whole numbers of at least 0"
        )
    needed = count_bytes(dtype, shape)
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{name!r} has data_offsets {offsets}, expected {needed} bytes for {entry['dtype']} of shape {shape}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(numbers: Any) -> bool:
    # No bool, which Python counts as int, and nothing past 63 bits, which torch cannot hold.
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 2**63 for number in numbers
    )
