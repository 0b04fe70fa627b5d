"""Base plus change as one ordinary model folder, tensor by tensor, the base checked on the way.

A run that was trained beside a quantised residual is merged into what that stands for: Q + s L R,
in 16 bits.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.checkpoint.fingerprint import canonical, check_tensor, tensor_digest
from pissa.checkpoint.layout import Plan, Spec
from pissa.checkpoint.output import write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, kind_of
from pissa.checkpoint.writer import parse_bytes
from pissa.errors import WrongBaseError
from pissa.jobs import MergeSettings
from pissa.keywords import spelled_out
from pissa.linalg import frobenius
from pissa.quant import quantiser
from pissa.records import Record, versions
from pissa.splits import Lora
from pissa.surgery.decompose import STORED, check_dtype, output_dtype
from pissa.surgery.folders import Changes, principal_share, read_changes, refuse_principal
from pissa.surgery.packing import (
    PackedWeights,
    is_residual,
    packed_modules,
    packed_names,
    quantisation_config,
)
from pissa.surgery.pairing import refuse_half_a_residual, refuse_other_kind
from pissa.surgery.pipeline import check_workers
from pissa.surgery.streaming import SHARDS, Piece, StreamJob
from pissa.untyped import Json


@spelled_out(MergeSettings)
def merge(
    base: str | Path,
    run: str | Path,
    out: str | Path,
    settings: MergeSettings,
) -> Record:
    """Write base plus change for every target and the rest as it is; sums in float32, rounded once.

    A merge that was killed goes on when it is called again in the same way.

    Args:
        base: the original model, a folder or a Hub id; for a run beside a quantised residual, that
            residual's folder.
        run: a run, its state/ or a plain LoRA.
        out: the folder to write; it appears whole or not at all.
        settings: a keyword argument each, see `pissa.jobs`.

    Returns:
        The record; `notes["errors"]` has the relative error of what was written, and of nf4 where
        the base is packed.

    Raises:
        WrongBaseError: the run belongs to another base; names the tensor.
    """
    asked = settings
    check_dtype(asked.dtype)
    check_workers(asked.workers)
    run = Path(run)
    checkpoint = Checkpoint.open(base, asked.revision)
    found = read_changes(run, on_residual=is_residual(checkpoint.config))
    job = _Job(checkpoint, found, run, asked)
    return job.into(out, force=asked.force, workers=asked.workers, progress=asked.progress)


class _Job(StreamJob):
    """One merge: which stored tensor takes which change, and under which name it is written."""

    def __init__(
        self, checkpoint: Checkpoint, found: Changes, run: Path, asked: MergeSettings
    ) -> None:
        self.checkpoint, self.found, self.run, self.asked = checkpoint, found, run, asked
        self.dtype, self.shard_bytes = asked.dtype, parse_bytes(asked.max_shard_bytes)
        packer = self.packer = quantiser(asked.quant) if asked.quant else None
        refuse_other_kind(checkpoint, found, run, self.advice())
        # A run that trained a head belongs to a model class that the base's own config does not
        # name.
        self.head_config: Json | None = (
            found.record.notes.get("model_config") if found.record else None
        )
        self.skeleton = build_skeleton(
            checkpoint.folder, config=self.head_config, trust_remote_code=asked.trust_remote_code
        )
        modules = dict(self.skeleton.named_modules())
        for target in found.changes:
            if target.module not in modules:
                raise WrongBaseError(
                    f"{run} changes `{target.weight}`, which {checkpoint.name} lacks. {self.advice()}"
                )
        self.prefix = getattr(self.skeleton, "base_model_prefix", "")
        self.parameters = parameter_names(self.skeleton, checkpoint.tensors)
        self.packed = PackedWeights(checkpoint)
        self.changes: dict[str, tuple[Target, Lora]] = {}
        for name, target in stored_targets(
            list(found.changes), self.parameters, checkpoint.folder
        ).items():
            change = found.changes[target]
            # An adapter's file has one flag "transposed" for all its layers; the model knows which
            # of them are.
            kind = kind_of(modules[target.module]) or target.kind
            own = Target(target.module, kind, self.shape(name, kind, target))
            if own.matrix_shape != (change.B.shape[0], change.A.shape[1]):
                raise WrongBaseError(
                    f"{run} changes `{name}` as {[change.B.shape[0], change.A.shape[1]]} (out, in), which is "
                    f"{list(own.matrix_shape)} in {checkpoint.name}. {self.advice()}"
                )
            self.changes[name] = own, change
        self.packed_out = (
            packed_modules(packer, [target for target, _ in self.changes.values()])
            if packer
            else set()
        )
        refuse_half_a_residual(checkpoint, self.packed.names, self.changes, run)
        self.extras = {_module_name(name): tensor for name, tensor in found.extras.items()}
        # Canonical, as the record of the run has them.
        self.keys = {
            name: canonical(self.parameters.get(name, name), self.prefix)
            for name in checkpoint.tensors
        }
        served_on = found.record.served_on if found.record else None
        self.recorded = dict(served_on.tensors) if served_on else {}
        if packer:
            # Refuses now, not at the end
            quantisation_config(packer, self.skeleton, self.packed_out, torch.float32)

    def late(self) -> set[str]:
        """The state of each packed weight, whose JSON has a length of its own."""
        return {
            key
            for name, (target, _) in self.changes.items()
            if self.packer and target.module in self.packed_out
            for key in packed_names(self.new_name(name), self.packer.late).values()
        }

    def further(self) -> dict[str, Tensor]:
        """Modules that trained whole."""
        return {name: t.to(output_dtype(t.dtype, self.dtype)) for name, t in self.extras.items()}

    def inputs(self) -> list[Path]:
        """The base and the run."""
        return [self.checkpoint.folder, self.run]

    def facts(self) -> Json:
        """What is asked, and what the run holds."""
        digest = hashlib.sha256()
        for name, (_, change) in sorted(self.changes.items(), key=lambda item: item[0]):
            for tensor in (change.A, change.B):
                digest.update(tensor_digest(tensor).encode())
            digest.update(name.encode())
        return {
            "dtype": self.dtype,
            "quant": self.asked.quant,
            "changes": digest.hexdigest(),
            "extras": {name: tensor_digest(tensor) for name, tensor in self.extras.items()},
            "head_config": self.head_config,
            "record": self.found.record.to_json() if self.found.record else None,
        }

    def shape(self, name: str, kind: str, target: Target) -> tuple[int, ...]:
        """Of the weight as the model has it, whatever the checkpoint stores."""
        if name not in self.packed.names:
            return self.checkpoint.tensors[name].shape
        rows, columns = target.matrix_shape
        return (columns, rows) if kind == "conv1d" else (rows, columns)

    def planned(self, name: str) -> dict[str, Plan]:
        """What is written for a tensor of the base."""
        plan = self._planned(name)
        return {SHARDS: plan} if plan else {}

    def _planned(self, name: str) -> dict[str, Spec]:
        new = self.new_name(name)
        if new in self.extras or self.packed.weight_of(name) not in (None, name):
            return {}
        own = self.checkpoint.tensors[name]
        if name not in self.changes:
            return {new: (output_dtype(own.dtype, self.dtype), own.shape)}
        target, _ = self.changes[name]
        dtype = self.weight_dtype(name)
        if self.packer is None or target.module not in self.packed_out:
            return {new: (dtype, target.shape)}
        parts = self.packer.plan(target.matrix_shape, dtype)
        return {packed_names(new, parts)[part]: spec for part, spec in parts.items()}

    def weight_dtype(self, name: str) -> torch.dtype:
        """Of a merged weight: as asked, as stored, or as a quantised one is unpacked."""
        if name in self.packed.names:
            return STORED[self.dtype or str(self.checkpoint.config.get("dtype", "bfloat16"))]
        return output_dtype(self.checkpoint.tensors[name].dtype, self.dtype)

    def new_name(self, name: str) -> str:
        """The stored name, or the parameter's own where the model got another head."""
        return self.parameters.get(name, name) if self.head_config else name

    def piece(self, name: str) -> Piece:
        """A tensor of the base, checked, with its change."""
        tensor, key = self.checkpoint.read(name), self.keys[name]
        if key in self.recorded:
            what = f"the change in {self.run}"
            check_tensor(key, self.recorded[key], tensor, what=what, advice=self.advice())
        return self.merged(name, tensor) if self._planned(name) else Piece(name)

    def finish(self, staging: Path, final: Path, pieces: list[Piece]) -> Record:
        """Refuse a base that lacks a tensor, or an adapter that holds a part of it; then the small files."""
        absent = self.recorded.keys() - self.keys.values()
        if absent:
            raise WrongBaseError(
                f"`{sorted(absent)[0]}` is absent from {self.checkpoint.name}. {self.advice()}"
            )
        shares = [piece.facts["share"] for piece in pieces if "share" in piece.facts]
        refuse_principal(self.run, shares, self.checkpoint.name)
        self.write_config(staging)
        record = self.record(pieces)
        write_json(staging / plain.RECORD, record.to_json())
        return record

    def merged(self, name: str, tensor: Tensor) -> Piece:
        """What takes a tensor's place, and the squared norms of what each format loses of it."""
        new = self.new_name(name)
        if name not in self.changes:
            dtype, _ = self._planned(name)[new]
            return Piece(name, {new: tensor.to(dtype)})
        target, change = self.changes[name]
        packed = name in self.packed.names
        matrix = self.packed.dense(name) if packed else target.to_matrix(tensor)
        share = {} if self.found.record else {"share": principal_share(matrix, change)}
        dtype = self.weight_dtype(name)
        wide = torch.promote_types(matrix.dtype, torch.float32)
        whole = matrix.to(wide) + change.delta().to(wide)
        if self.packer is None:
            tensors, written = {new: target.from_matrix(whole.to(dtype))}, whole.to(dtype)
        else:
            quantised = self.packer.quantise(whole, dtype)
            written = quantised.dense
            names = packed_names(new, quantised.parts)
            tensors = {names[part]: t for part, t in quantised.parts.items()}
            if target.module not in self.packed_out:
                tensors = {new: target.from_matrix(written)}
        errors = {"weight": frobenius(whole) ** 2, "written": frobenius(whole - written) ** 2}
        if packed and self.packer is None:
            errors["nf4"] = frobenius(whole - quantiser("nf4").quantise(whole, dtype).dense) ** 2
        return Piece(name, tensors, {"errors": errors, **share})

    def write_config(self, folder: Path) -> None:
        """Config and tokenizer of the base, with the head's config where there is one."""
        for file in self.checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        config = {**self.checkpoint.config, **(self.head_config or {})}
        for key in ("pissa", "quantization_config", "torch_dtype"):
            config.pop(key, None)  # of the residual that the base may have been
        dtype = next(self.weight_dtype(name) for name in self.changes)
        config["dtype"] = str(dtype).removeprefix("torch.")
        if self.packer:
            config["quantization_config"] = quantisation_config(
                self.packer, self.skeleton, self.packed_out, dtype
            )
        write_json(folder / "config.json", config)

    def record(self, pieces: list[Piece]) -> Record:
        """The record of kind "merged"."""
        origin = self.found.record
        recipe, base = (origin.recipe, origin.base) if origin else (None, None)
        squares: dict[str, float] = {}
        for piece in pieces:
            for key, square in piece.facts.get("errors", {}).items():
                squares[key] = squares.get(key, 0.0) + square
        whole = squares.pop("weight", 0.0)
        errors = {key: (square / whole) ** 0.5 if whole else 0.0 for key, square in squares.items()}
        return Record("merged", recipe, base, notes={"errors": errors}, versions=versions())

    def advice(self) -> str:
        """Which base the run needs."""
        served_on = self.found.record.served_on if self.found.record else None
        return f"Use the base it was made on: {served_on.name}" if served_on else "Use its own base"


def _module_name(adapter_key: str) -> str:
    """`base_model.model.classifier.weight` in an adapter file is `classifier.weight` in the model."""
    return adapter_key.removeprefix("base_model.model.")
