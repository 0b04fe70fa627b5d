"""From one checkpoint to another, tensor by tensor: planned, worked on, written, receipted,
resumed.

A job says what takes each tensor's place; everything else is here. What a killed run had finished
is in its staging folder, with a line in `pieces.jsonl` for each tensor of the source; the same job
goes on from there, and ends with the same bits, since no tensor's work depends on another's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pissa.checkpoint.layout import Plan, Spec, plan_bytes
from pissa.checkpoint.output import staged_output
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.writer import CheckpointWriter, TensorFile
from pissa.jobs import Progress
from pissa.records import Record, versions
from pissa.surgery.pipeline import in_order
from pissa.untyped import Json

PIECES = "pieces.jsonl"
SHARDS = ""
"""Of the files of an output, the weights themselves, in as many shards as they take."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Piece:
    """What takes the place of one tensor of the source.

    Attributes:
        name: of the tensor in the source.
        tensors: what is written, by the names in the output.
        facts: JSON that is kept of it, for the record.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)
    facts: Json = field(default_factory=dict)

    def receipt(self, late: set[str]) -> str:
        """A line that stands for the piece once it is written; `late` tensors, JSON, are in it."""
        texts = {
            name: bytes(tensor.tolist()).decode()
            for name, tensor in self.tensors.items()
            if name in late
        }
        return json.dumps({"name": self.name, "facts": self.facts, "tensors": texts}) + "\n"

    @classmethod
    def from_receipt(cls, line: str) -> Piece:
        """The piece that a line stands for, with its late tensors."""
        said = json.loads(line)
        tensors = {
            name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            for name, text in said["tensors"].items()
        }
        return cls(said["name"], tensors, said["facts"])


class StreamJob(ABC):
    """One checkpoint on its way to another.

    Attributes:
        checkpoint: the source.
        shard_bytes: most bytes of tensors in one file of the weights.
        folder: of the weights in the output.
    """

    checkpoint: Checkpoint
    shard_bytes: int
    folder: ClassVar[str] = ""

    @abstractmethod
    def planned(self, name: str) -> Mapping[str, Plan]:
        """What is written for a tensor of the source: dtypes and shapes by file and name.

        Files are paths in the output, `SHARDS` for the weights.
        """

    @abstractmethod
    def piece(self, name: str) -> Piece:
        """Read a tensor of the source and make what is written for it; runs beside others."""

    @abstractmethod
    def finish(self, staging: Path, final: Path, pieces: list[Piece]) -> Record:
        """Check what only all pieces tell, and write the small files, `pissa.json` last.

        Args:
            staging: the folder to write into.
            final: what it will be called.
            pieces: in the order of the source, without their tensors.
        """

    @abstractmethod
    def facts(self) -> Json:
        """All that a bit of the output depends on, beside the source and versions, as JSON."""

    def late(self) -> set[str]:
        """Tensors whose length is only known once they are made."""
        return set()

    def further(self) -> dict[str, Tensor]:
        """Weights that no tensor of the source gives."""
        return {}

    def inputs(self) -> list[Path]:
        """Folders and files that are read."""
        return [self.checkpoint.folder]

    @cached_property
    def key(self) -> str:
        """What has to be the same for a killed run to be gone on with."""
        folder = self.checkpoint.folder
        shards = {info.shard for info in self.checkpoint.tensors.values()}
        stats = {shard: (folder / shard).stat() for shard in sorted(shards)}
        facts = {
            "job": f"{type(self).__module__}.{type(self).__qualname__}",
            "facts": self.facts(),
            "threads": torch.get_num_threads(),
            # What was written but not yet on the disk outlives a killed process, not a machine.
            "boot": _BOOT.read_text() if _BOOT.is_file() else "",
            "shard_bytes": self.shard_bytes,
            "source": {
                shard: [str(folder.resolve()), file.st_size, file.st_mtime_ns]
                for shard, file in stats.items()
            },
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def into(
        self,
        out: str | Path,
        *,
        force: bool = False,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Record:
        """Write it to `out`, on from where a killed run of the same key left it."""
        plans = self._plans()
        needs = sum(map(plan_bytes, plans.values()))
        with staged_output(
            out, force=force, needs_bytes=needs, inputs=self.inputs(), job=self.key
        ) as staging:
            pieces = self._write(staging, plans, workers, progress)
            record = self.finish(staging, Path(out), pieces)
            (staging / PIECES).unlink()
        return record

    def _plans(self) -> dict[str, dict[str, Spec]]:
        """All tensors of each file of the output."""
        plans: dict[str, dict[str, Spec]] = {SHARDS: {}}
        for name in self.checkpoint.tensors:
            for file, plan in self.planned(name).items():
                plans.setdefault(file, {}).update(plan)
        plans[SHARDS] |= {name: (t.dtype, tuple(t.shape)) for name, t in self.further().items()}
        return plans

    def _write(
        self,
        staging: Path,
        plans: Mapping[str, Plan],
        workers: int | None,
        progress: Progress | None,
    ) -> list[Piece]:
        """Write all that a killed run did not finish; pieces in the order of the source."""
        late = self.late()
        pieces = {piece.name: piece for piece in finished(staging / PIECES)}
        done = {
            key for name in pieces for plan in self.planned(name).values() for key in plan
        } - late
        file_of = {key: file for file, plan in plans.items() for key in plan}
        total = sum(info.nbytes for info in self.checkpoint.tensors.values())
        done_bytes = 0
        with ExitStack() as stack:
            files: dict[str, CheckpointWriter | TensorFile] = {}
            for file, plan in plans.items():
                written = done & plan.keys()
                if file == SHARDS:
                    shards = staging / self.folder, plan, self.shard_bytes, late, written
                    files[file] = stack.enter_context(CheckpointWriter(*shards))
                else:
                    (staging / file).parent.mkdir(parents=True, exist_ok=True)
                    files[file] = stack.enter_context(
                        TensorFile(staging / file, plan, done=written)
                    )
            receipts = stack.enter_context((staging / PIECES).open("a", encoding="utf-8"))
            for piece in pieces.values():
                for key, tensor in piece.tensors.items():
                    files[file_of[key]].write(key, tensor)
                done_bytes += self.checkpoint.tensors[piece.name].nbytes
            rest = [name for name in self.checkpoint.tensors if name not in pieces]
            for piece in in_order(self.piece, rest, workers):
                for key, tensor in piece.tensors.items():
                    files[file_of[key]].write(key, tensor)
                receipts.write(piece.receipt(late))
                receipts.flush()
                pieces[piece.name] = dataclasses.replace(piece, tensors={})
                done_bytes += self.checkpoint.tensors[piece.name].nbytes
                if progress:
                    progress(piece.name, done_bytes, total)
            for key, tensor in self.further().items():
                files[SHARDS].write(key, tensor)
        return [pieces[name] for name in self.checkpoint.tensors]


def finished(path: Path) -> list[Piece]:
    """The pieces that a killed run finished; a last line that the kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return [Piece.from_receipt(line) for line in whole]
