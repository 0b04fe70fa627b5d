"""Base plus change as one ordinary model folder, tensor by tensor, the base checked on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.checkpoint.fingerprint import canonical, check_tensor
from pissa.checkpoint.layout import plan_bytes
from pissa.checkpoint.output import staged_output, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, kind_of
from pissa.checkpoint.writer import CheckpointWriter, parse_bytes
from pissa.errors import WrongBaseError
from pissa.records import Record, versions
from pissa.splits import Lora
from pissa.surgery.decompose import Progress, check_dtype, output_dtype
from pissa.surgery.folders import Changes, principal_share, read_changes, refuse_principal


def merge(
    base: str | Path,
    run: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write ``W + change`` for every target and the rest as it is; sums in float32, rounded once.

    Args:
        base: the original model, a folder or a Hub id.
        run: a run, its state/ or a plain LoRA.
        out: the folder to write; it appears whole or not at all.
        dtype: "float32", "bfloat16" or "float16"; as stored by default.
        max_shard_bytes: size of an output file.
        revision: of a Hub id.
        trust_remote_code: whether the model's own code may run.
        force: replace `out`.
        progress: told after every tensor.

    Raises:
        WrongBaseError: the run belongs to another base; names the tensor.
    """
    check_dtype(dtype)
    run = Path(run)
    found = read_changes(run)
    checkpoint = Checkpoint.open(base, revision)
    job = _Job(checkpoint, found, run, dtype, trust_remote_code)
    shard_bytes = parse_bytes(max_shard_bytes)
    with (
        staged_output(out, force=force, needs_bytes=plan_bytes(job.plan), inputs=[checkpoint.folder, run]) as folder,
        CheckpointWriter(folder, job.plan, shard_bytes) as writer,
    ):
        job.write_tensors(writer, progress)
        job.write_config(folder)
        record = job.record()
        write_json(folder / plain.RECORD, record.to_json())
    return record


class _Job:
    """One merge: which stored tensor takes which change, and under which name it is written."""

    def __init__(self, checkpoint: Checkpoint, found: Changes, run: Path, dtype: str | None, remote_code: bool) -> None:
        self.checkpoint, self.found, self.run = checkpoint, found, run
        # A run that trained a head belongs to a model class that the base's own config does not name.
        self.head_config: dict[str, Any] | None = found.record.notes.get("model_config") if found.record else None
        skeleton = build_skeleton(checkpoint.folder, config=self.head_config, trust_remote_code=remote_code)
        modules = dict(skeleton.named_modules())
        for target in found.changes:
            if target.module not in modules:
                raise WrongBaseError(f"{run} changes `{target.weight}`, which {checkpoint.name} lacks. {self.advice()}")
        self.prefix = getattr(skeleton, "base_model_prefix", "")
        self.parameters = parameter_names(skeleton, checkpoint.tensors)
        self.changes: dict[str, tuple[Target, Lora]] = {}
        for name, target in stored_targets(list(found.changes), self.parameters, checkpoint.folder).items():
            change, shape = found.changes[target], checkpoint.tensors[name].shape
            # An adapter's file has one flag "transposed" for all its layers; the model knows which of them are.
            own = Target(target.module, kind_of(modules[target.module]) or target.kind, shape)
            if own.matrix_shape != (change.B.shape[0], change.A.shape[1]):
                raise WrongBaseError(
                    f"{run} changes `{name}` as {[change.B.shape[0], change.A.shape[1]]} (out, in), which is "
                    f"{list(own.matrix_shape)} in {checkpoint.name}. {self.advice()}"
                )
            self.changes[name] = own, change
        self.shares: list[float] = []
        self.extras = {_module_name(name): tensor for name, tensor in found.extras.items()}
        self.plan = {
            self.new_name(name): (output_dtype(info.dtype, dtype), info.shape)
            for name, info in checkpoint.tensors.items()
            if self.new_name(name) not in self.extras
        }
        self.plan |= {name: (output_dtype(t.dtype, dtype), tuple(t.shape)) for name, t in self.extras.items()}

    def new_name(self, name: str) -> str:
        """The stored name, or the parameter's own where the model got another head."""
        return self.parameters.get(name, name) if self.head_config else name

    def write_tensors(self, writer: CheckpointWriter, progress: Progress | None) -> None:
        """Stream the base through, checking every tensor and adding the changes."""
        base = self.found.record.base if self.found.record else None
        recorded = dict(base.tensors) if base else {}
        total = sum(info.nbytes for info in self.checkpoint.tensors.values())
        done = 0
        for name, info in self.checkpoint.tensors.items():
            tensor = self.checkpoint.read(name)
            key = canonical(self.parameters.get(name, name), self.prefix)
            if key in recorded:
                what = f"the change in {self.run}"
                check_tensor(key, recorded.pop(key), tensor, what=what, advice=self.advice())
            if self.new_name(name) in self.plan and self.new_name(name) not in self.extras:
                writer.write(self.new_name(name), self.merged(name, tensor).to(self.plan[self.new_name(name)][0]))
            done += info.nbytes
            if progress:
                progress(name, done, total)
        if recorded:
            raise WrongBaseError(f"`{next(iter(recorded))}` is absent from {self.checkpoint.name}. {self.advice()}")
        refuse_principal(self.run, self.shares, self.checkpoint.name)
        for name, tensor in self.extras.items():
            writer.write(name, tensor.to(self.plan[name][0]))

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its change, if it has one."""
        if name not in self.changes:
            return tensor
        target, change = self.changes[name]
        wide = torch.promote_types(tensor.dtype, torch.float32)
        if self.found.record is None:
            self.shares.append(principal_share(target.to_matrix(tensor), change))
        return tensor.to(wide) + target.from_matrix(change.delta().to(wide))

    def write_config(self, folder: Path) -> None:
        """Config and tokenizer of the base, with the head's config where there is one."""
        for file in self.checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        config = {**self.checkpoint.config, **(self.head_config or {})}
        floats = [dtype for dtype, _ in self.plan.values() if dtype.is_floating_point]
        config["dtype"] = str(floats[0]).removeprefix("torch.")
        write_json(folder / "config.json", config)

    def record(self) -> Record:
        """The record of kind "merged"."""
        origin = self.found.record
        recipe, base = (origin.recipe, origin.base) if origin else (None, None)
        return Record("merged", recipe, base, versions=versions())

    def advice(self) -> str:
        """Which base the run needs."""
        origin = self.found.record
        return f"Use the base it was made on: {origin.base.name}" if origin and origin.base else "Use its own base"


def _module_name(adapter_key: str) -> str:
    """`base_model.model.classifier.weight` in an adapter file is `classifier.weight` in the model."""
    return adapter_key.removeprefix("base_model.model.")
