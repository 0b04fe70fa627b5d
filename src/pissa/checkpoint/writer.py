"""Writing a safetensors checkpoint one tensor at a time; the index comes last, so that a torn one looks torn."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Self

import torch

from pissa.checkpoint.layout import (
    INDEX_NAME,
    SINGLE_NAME,
    Plan,
    Spec,
    count_bytes,
    make_header,
    plan_bytes,
)
from pissa.checkpoint.output import write_json
from pissa.errors import InputError, OutputError, did_you_mean

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str | int) -> int:
    """A size such as `500MB`, `1.5GiB` or `4096` in bytes; KB, MB, GB are powers of 1000, KiB, MiB,
    GiB of 1024.

    Raises:
        InputError: Not a number with one of these units, or less than one byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text).strip(), re.ASCII)
    unit = _UNITS.get(found[2].upper()) if found else None
    size = int(Decimal(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise InputError(
            f"{text!r} is not a size in bytes: write it like 500MB, 1.5GiB or 4096, at least one byte"
        )
    return size


class TensorFile:
    """One safetensors file, laid out before the first tensor comes, so that no more than one is
    ever in memory.

    The space of the header is kept free at first and filled by `close`: a file that lacks a tensor
    has no header, and every reader refuses it.

    Attributes:
        missing: Names of the planned tensors not written yet.

    Args:
        path: The file to make; it must not exist.
        plan: Dtype and shape of every tensor that will come.
        metadata: Strings for the header, beside the `{"format": "pt"}` that other tools ask for.
        late: Names of short 1-D tensors whose length the plan only bounds; they wait in memory and
            are written last.
        done: Names that a killed run with the same plan wrote into this file already, none that are
            late; maybe no name at all. None for a file that must be new.

    Raises:
        InputError: A dtype or name that safetensors cannot hold.
        OutputError: The file exists, or does not where something is done.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan,
        metadata: Mapping[str, str] | None = None,
        late: Collection[str] = (),
        done: Collection[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._plan, self._late = dict(plan), set(late) & plan.keys()
        self._waiting: dict[str, torch.Tensor] = {}
        self._metadata = {"format": "pt", **(metadata or {})}
        self._header, self._offsets = make_header(self._plan, self._metadata, self._late)
        self.missing = set(self._plan) - set(done or ())
        try:
            self._file = self.path.open("xb" if done is None else "r+b" if done else "wb")
        except FileExistsError as error:
            raise OutputError(f"{self.path} exists already: choose another folder") from error
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.path} is gone, but a run was to go on with it: start again"
            ) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor, in any order, straight from its memory.

        Raises:
            InputError: The tensor is not in the plan, differs from it, or was written before.
        """
        planned = self._plan.get(name)
        if planned is None:
            raise InputError(
                f"{name!r} is not in the plan of {self.path}.{did_you_mean(name, self._plan)}"
            )
        if name not in self.missing:
            raise InputError(f"{name!r} was written to {self.path} before: write each tensor once")
        dtype, shape = planned
        if name in self._late and tensor.ndim == 1 and len(tensor) <= shape[0]:
            self._plan[name], self._waiting[name] = (dtype, tuple(tensor.shape)), tensor
            shape = tensor.shape
        if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            raise InputError(
                f"{name!r} is {tensor.dtype} {list(tensor.shape)}, but the plan of {self.path} says "
                f"{dtype} {list(shape)}: convert the tensor or change the plan"
            )
        if name not in self._late:
            self._put(name, tensor)
        self.missing.remove(name)

    def close(self) -> None:
        """Fill in the header and flush to the disk; does nothing on a closed file.

        Raises:
            OutputError: A planned tensor was not written; the file is left without a header.
        """
        if self._file.closed:
            return
        with self._file:
            if self.missing:
                raise _unfinished(self.path, [name for name in self._plan if name in self.missing])
            # The same length as at first, so the data lies where the offsets say.
            self._header, self._offsets = make_header(
                self._plan, self._metadata, self._late, len(self._header)
            )
            for name, tensor in self._waiting.items():
                self._put(name, tensor)
            self._file.seek(0)
            self._file.write(self._header)
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close without a header."""
        self._file.close()

    @property
    def nbytes(self) -> int:
        """Size of the tensors, as far as they are known."""
        return plan_bytes(self._plan)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self._file.seek(self._offsets[name])
        # As bytes, for numpy knows no bfloat16 or float8. On a contiguous tensor of the CPU nothing
        # is copied.
        self._file.write(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        )
        self._file.flush()  # so that it outlives a kill

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abandon()


class CheckpointWriter:
    """A folder of shards named as transformers does, and the index, written last; one file and no
    index if all fits.

    A shard is opened at its first tensor and closed at its last. Each takes tensors in the order of
    the plan up to `max_shard_bytes`; a larger tensor gets a shard of its own.

    Args:
        folder: Where to write; made if absent, and free of model weights.
        plan: Dtype and shape of every tensor that will come.
        max_shard_bytes: Most bytes of tensors in one file, at least 1.
        late: See `TensorFile`.
        done: See `TensorFile`.

    Raises:
        InputError: An empty plan, no room in a shard, or a dtype that safetensors cannot hold.
        OutputError: The folder holds model weights, which would mix with the new ones.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Plan,
        max_shard_bytes: int,
        late: Collection[str] = (),
        done: Collection[str] | None = None,
    ) -> None:
        shards = _assign_shards(plan, max_shard_bytes)
        make_header(plan, {})  # refuses what safetensors cannot hold now, not at the last shard
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if done is None and (
            stale := sorted(path.name for path in self.folder.glob("model*.safetensors*"))
        ):
            raise OutputError(f"{self.folder} holds {stale[0]} already: choose another folder")
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        self._plans = dict(zip(names if len(names) > 1 else [SINGLE_NAME], shards, strict=True))
        self._shard_of = {name: shard for shard, part in self._plans.items() for name in part}
        self._files: dict[str, TensorFile] = {}
        self._late = late
        self._done = None if done is None else set(done)
        for shard, part in self._plans.items():
            if self._done and part.keys() & self._done:
                self._open(shard)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor, in any order; in the order of the plan one file is open at a
        time.

        Raises:
            InputError: The tensor is not in the plan, differs from it, or was written before.
        """
        shard = self._shard_of.get(name)
        if shard is None:
            raise InputError(
                f"{name!r} is not in the plan of {self.folder}.{did_you_mean(name, self._shard_of)}"
            )
        if shard not in self._files:
            self._open(shard)
        self._files[shard].write(name, tensor)
        if not self._files[shard].missing:
            self._files[shard].close()

    def close(self) -> None:
        """Write the index.

        Raises:
            OutputError: A planned tensor was not written; there is no index then.
        """
        files = self._files
        missing = [
            name
            for name, shard in self._shard_of.items()
            if shard not in files or name in files[shard].missing
        ]
        if missing:
            self.abandon()
            raise _unfinished(self.folder, missing)
        for file in files.values():
            file.close()  # a killed run may have written the last tensor but no header
        if len(self._plans) > 1:
            total = sum(file.nbytes for file in files.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._shard_of}
            write_json(self.folder / INDEX_NAME, index)

    def abandon(self) -> None:
        """Close all files and write no index."""
        for file in self._files.values():
            file.abandon()

    def _open(self, shard: str) -> None:
        part = self._plans[shard]
        done = None if self._done is None else part.keys() & self._done
        self._files[shard] = TensorFile(self.folder / shard, part, late=self._late, done=done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.abandon()


def _assign_shards(plan: Plan, max_shard_bytes: int) -> list[dict[str, Spec]]:
    if not plan or max_shard_bytes < 1:
        raise InputError(
            f"{len(plan)} tensors in shards of {max_shard_bytes} bytes: give at least 1 of both"
        )
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, (dtype, shape) in plan.items():
        if shards[-1] and filled + count_bytes(dtype, shape) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (dtype, shape)
        filled += count_bytes(dtype, shape)
    return shards


def _unfinished(path: Path, missing: list[str]) -> OutputError:
    return OutputError(
        f"{path} lacks {len(missing)} planned tensors, {missing[0]!r} first: write all before closing"
    )
