"""A 4-bit model as an ordinary one: ``(Q(R) + L) diag(1 / smooth)`` in 16 or 32 bits, which every tool loads."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.checkpoint.layout import Plan
from pissa.checkpoint.output import read_json, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton
from pissa.checkpoint.targets import Target, find_targets
from pissa.checkpoint.writer import parse_bytes
from pissa.jobs import DenseSettings
from pissa.keywords import spelled_out
from pissa.records import Record, versions
from pissa.surgery.decompose import STORED, check_dtype, output_dtype
from pissa.surgery.streaming import SHARDS, Piece, StreamJob
from pissa.untyped import Json
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.loading import w4a4_note
from pissa.w4a4.writing import WEIGHTS

CODES = "codes"
"""The part of a 4-bit layer in whose place the dense weight is written."""


@spelled_out(DenseSettings)
def export_dense(source: str | Path, out: str | Path, settings: DenseSettings) -> Record:
    """Write what the 4-bit weights stand for; activations are no longer quantized, which no weight
    can carry.

    Args:
        source: a folder that `svdquant` wrote.
        out: the folder to write, an ordinary Hugging Face model; it appears whole or not at all.
        settings: a keyword argument each, see `pissa.jobs`.

    Returns:
        The record that was written.

    Raises:
        CheckpointError: another kind of folder.
    """
    check_dtype(settings.dtype)
    source, shard_bytes = Path(source), parse_bytes(settings.max_shard_bytes)
    note = w4a4_note(source)
    own = str(read_json(source / "config.json").get("dtype", "float32"))
    skeleton = build_skeleton(source, trust_remote_code=settings.trust_remote_code)
    targets = {target.module: target for target in find_targets(skeleton, note["modules"])}
    stored = Checkpoint.open(source / WEIGHTS, need_config=False)
    wanted = STORED[settings.dtype or own]
    job = _Job(stored, shard_bytes, source, targets, note["rank"], settings.dtype, wanted)
    return job.into(out, force=settings.force, workers=1, progress=settings.progress)


@dataclass
class _Job(StreamJob):
    """The parts of a 4-bit layer give one weight, all other tensors themselves."""

    checkpoint: Checkpoint
    shard_bytes: int
    source: Path
    targets: dict[str, Target]
    rank: int
    asked: str | None
    wanted: torch.dtype

    @cached_property
    def parts(self) -> frozenset[str]:
        """Of a 4-bit layer, by name."""
        return frozenset(W4A4Linear(1, 1, 1, device="meta").state_dict())

    def planned(self, name: str) -> dict[str, Plan]:
        """What is written for a stored tensor: of a layer's parts, for its codes alone."""
        module, _, part = name.rpartition(".")
        if module not in self.targets or part not in self.parts:
            info = self.checkpoint.tensors[name]
            return {SHARDS: {name: (output_dtype(info.dtype, self.asked), info.shape)}}
        if part != CODES:
            return {}
        return {SHARDS: {f"{module}.weight": (self.wanted, self.targets[module].shape)}}

    def piece(self, name: str) -> Piece:
        """Read it, and of a layer all its parts."""
        plan = self.planned(name).get(SHARDS, {})
        target = self.targets.get(name.removesuffix(f".{CODES}"))
        tensors = {}
        for key, (dtype, _) in plan.items():
            tensor = self._dense(target) if target else self.checkpoint.read(name)
            tensors[key] = tensor.to(dtype)
        return Piece(name, tensors)

    def facts(self) -> Json:
        """The dtype; all else is the source's."""
        return {"dtype": str(self.wanted)}

    def inputs(self) -> list[Path]:
        """The whole folder, of which the weights are one down."""
        return [self.source]

    def finish(self, staging: Path, final: Path, pieces: list[Piece]) -> Record:
        """Config without the note of 4 bits, tokenizer, and a record that names the same base."""
        for file in self.source.iterdir():
            if file.is_file():
                shutil.copyfile(file, staging / file.name)
        config = read_json(self.source / "config.json")
        config.pop("pissa")
        config["dtype"] = str(self.wanted).removeprefix("torch.")
        write_json(staging / "config.json", config)
        said = read_json(self.source / plain.RECORD)
        facts = said | {"kind": "merged", "notes": {}, "versions": versions()}
        record = Record.from_json(facts, str(self.source / plain.RECORD))
        write_json(staging / plain.RECORD, record.to_json())
        return record

    def _dense(self, target: Target) -> Tensor:
        """The weight of one target in its stored shape, float32."""
        rows, columns = target.matrix_shape
        layer = W4A4Linear(columns, rows, self.rank)
        parts = {part: f"{target.module}.{part}" for part in layer.state_dict()}
        layer.load_state_dict({part: self.checkpoint.read(name) for part, name in parts.items()})
        return target.from_matrix(layer.dense())
