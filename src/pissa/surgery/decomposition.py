"""One decomposition on its way through a checkpoint: what is planned, split, written and recorded.

What a killed run had finished is in its staging folder, with a line in `pieces.jsonl` for each tensor; the same job
goes on from there, and ends with the same bits, since no tensor's split depends on another's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.adapters import factors, plain
from pissa.adapters.plain import INIT
from pissa.adapters.splitting import allotted, quantiser_of, seen_of, split_by
from pissa.adapters.storing import store
from pissa.checkpoint.fingerprint import Digests, canonical, combined, tensor_digests
from pissa.checkpoint.layout import Spec, plan_bytes
from pissa.checkpoint.output import staged_output
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.targets import Target
from pissa.checkpoint.writer import CheckpointWriter, TensorFile
from pissa.observe import Observations
from pissa.quant import Quantiser
from pissa.records import Base, Recipe, Record, versions
from pissa.registry import get
from pissa.surgery.packing import packed_names, quantisation_config
from pissa.surgery.piece import Piece, finished
from pissa.surgery.pipeline import in_order
from pissa.surgery.small_files import write_small_files

FACTOR_DTYPE = torch.float32
PIECES = "pieces.jsonl"
BOOT = Path("/proc/sys/kernel/random/boot_id")
Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, the bytes done and the bytes in all."""


@dataclass
class Decomposition:
    """What is to be done to which checkpoint.

    Attributes:
        checkpoint: the base.
        skeleton: its model without weights.
        parameters: each tensor's parameter in the model.
        targets: by the name of their tensor.
        recipe: how to split.
        dtypes: of each tensor in the output; of a packed one the dtype it is unpacked in.
        packed: modules whose weights are written in few bits.
        device: where the algebra runs.
        shard_bytes: most bytes of tensors in one file.
        observations: what was seen of the base on calibration rows, where the method needs it.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    parameters: dict[str, str]
    targets: dict[str, Target]
    recipe: Recipe
    dtypes: dict[str, torch.dtype]
    packed: frozenset[str]
    device: str
    shard_bytes: int
    observations: Observations | None = None

    @cached_property
    def weights(self) -> set[str]:
        """The model's parameters: a stored buffer (BERT's position ids) is no part of what makes the base the base."""
        return {name for name, _ in self.skeleton.named_parameters(remove_duplicate=False)}

    @cached_property
    def packer(self) -> Quantiser | None:
        """The quantiser of the residual, if it has one."""
        return quantiser_of(self.recipe)

    def allot(self) -> None:
        """Where the method gives layers ranks of their own, look at all of them and settle the ranks."""
        weights = ((target, self.matrix(name)) for name, target in self.targets.items())
        self.recipe = allotted(self.recipe, weights, lambda target: self.seen(target.weight))
        self.targets = {name: target for name, target in self.targets.items() if target.module in self.recipe.targets}
        self.packed &= frozenset(self.recipe.targets)

    def matrix(self, name: str) -> Tensor:
        """A target's weight [out, in]."""
        return self.targets[name].to_matrix(self.checkpoint.read(name).to(self.device))

    def seen(self, name: str) -> Any:
        """What the method needs to have been seen of a parameter."""
        key = canonical(name, getattr(self.skeleton, "base_model_prefix", ""))
        return seen_of(self.observations, self.recipe.method, key)

    def check(self) -> None:
        """Refuse what can be told before anything is written: a quantiser, or names that no config can tell apart."""
        if self.packer and self.packed:
            quantisation_config(self.packer, self.skeleton, self.packed, torch.float32)

    def plan(self, name: str) -> dict[str, Spec]:
        """What takes a tensor's place in the residual."""
        target, packer = self.targets.get(name), self.packer
        if target is None or packer is None or target.module not in self.packed:
            return {name: (self.dtypes[name], self.checkpoint.tensors[name].shape)}
        parts = packer.plan(target.matrix_shape, self.dtypes[name])
        names = packed_names(name, parts)
        return {names[part]: spec for part, spec in parts.items()}

    def residual_plan(self) -> dict[str, Spec]:
        """The tensors of the residual."""
        return {key: spec for name in self.checkpoint.tensors for key, spec in self.plan(name).items()}

    def start_plan(self) -> dict[str, Spec]:
        """The tensors of `pissa_init/`."""
        plan: dict[str, Spec] = {}
        for target in self.targets.values():
            shapes = factors.file_shapes(target, self.recipe.rank_of(target.module))
            plan |= {key: (FACTOR_DTYPE, shape) for key, shape in zip(factors.file_keys(target), shapes, strict=True)}
        return plan

    def core_plan(self) -> dict[str, Spec]:
        """The tensors of `pissa_init/start.safetensors`; none without a core."""
        chosen, recipe = get(self.recipe.method), self.recipe
        if not chosen.has_core:
            return {}
        return {
            f"{target.module}.{part}": (torch.int64 if part == "pattern" else FACTOR_DTYPE, shape)
            for target in self.targets.values()
            for part, shape in chosen.start_shapes(
                recipe.rank_of(target.module), target.matrix_shape, recipe.options
            ).items()
        }

    def late(self) -> set[str]:
        """Tensors whose length is only known once they are made."""
        packer = self.packer
        if packer is None:
            return set()
        packed = (weight for weight, target in self.targets.items() if target.module in self.packed)
        return {name for weight in packed for name in packed_names(weight, packer.late).values()}

    @property
    def key(self) -> str:
        """What has to be the same for a killed run to be gone on with: all that a bit of the output depends on."""
        folder = self.checkpoint.folder
        files = {info.shard: (folder / info.shard).stat() for info in self.checkpoint.tensors.values()}
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "observed": self.observations.digest() if self.observations else None,
            "dtypes": {name: str(dtype) for name, dtype in self.dtypes.items()},
            "packed": sorted(self.packed),
            "device": self.device,
            "threads": torch.get_num_threads(),
            # What was written but not yet on the disk outlives a killed process, not a machine that went down.
            "boot": BOOT.read_text() if BOOT.is_file() else "",
            "shard_bytes": self.shard_bytes,
            "base": {name: [str(folder.resolve()), file.st_size, file.st_mtime_ns] for name, file in files.items()},
            "versions": versions(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def into(self, out: Path, *, force: bool, workers: int | None = None, progress: Progress | None = None) -> Record:
        """Write it to `out`, on from where a killed run of the same key left it."""
        needs_bytes = sum(map(plan_bytes, (self.residual_plan(), self.start_plan(), self.core_plan())))
        inputs = [self.checkpoint.folder]
        with staged_output(out, force=force, needs_bytes=needs_bytes, inputs=inputs, job=self.key) as staging:
            return self.write(staging, out, workers, progress)

    def write(self, staging: Path, final: Path, workers: int | None, progress: Progress | None) -> Record:
        """Stream all tensors that a killed run did not finish, then the small files, `pissa.json` last."""
        init, late = staging / INIT, self.late()
        residual_plan, start_plan, core_plan = self.residual_plan(), self.start_plan(), self.core_plan()
        init.mkdir(exist_ok=True)
        pieces = {piece.name: piece for piece in finished(staging / PIECES)}
        written = {key for name in pieces for key in self.plan(name)} - late
        split = [self.targets[name] for name in pieces if name in self.targets]
        begun = {key for target in split for key in factors.file_keys(target)}
        begun_cores = {key for key in core_plan if key.rpartition(".")[0] in {target.module for target in split}}
        total = sum(info.nbytes for info in self.checkpoint.tensors.values())
        done = 0
        with ExitStack() as stack:
            residual = stack.enter_context(CheckpointWriter(staging, residual_plan, self.shard_bytes, late, written))
            start = stack.enter_context(TensorFile(init / plain.WEIGHTS, start_plan, done=begun))
            files = dict.fromkeys(start_plan, start)
            if core_plan:
                (init / plain.START).parent.mkdir(exist_ok=True)
                cores = stack.enter_context(TensorFile(init / plain.START, core_plan, done=begun_cores))
                files |= dict.fromkeys(core_plan, cores)
            receipts = stack.enter_context((staging / PIECES).open("a", encoding="utf-8"))
            for piece in pieces.values():
                for key, tensor in piece.tensors.items():
                    residual.write(key, tensor)
                done += self.checkpoint.tensors[piece.name].nbytes
            rest = [name for name in self.checkpoint.tensors if name not in pieces]
            for piece in in_order(self.split_tensor, rest, workers):
                for key, tensor in piece.tensors.items():
                    files.get(key, residual).write(key, tensor)
                receipts.write(piece.receipt(late))
                receipts.flush()
                pieces[piece.name] = dataclasses.replace(piece, tensors={})
                done += self.checkpoint.tensors[piece.name].nbytes
                if progress:
                    progress(piece.name, done, total)
        record = self.record([pieces[name] for name in self.checkpoint.tensors])
        write_small_files(self, staging, final, record)
        (staging / PIECES).unlink()
        return record

    def split_tensor(self, name: str) -> Piece:
        """What takes the tensor's place in the residual, and the start where it is a target."""
        tensor, dtype = self.checkpoint.read(name), self.dtypes[name]
        key = canonical(self.parameters.get(name, name), getattr(self.skeleton, "base_model_prefix", ""))
        base = {key: tensor_digests(tensor)} if self.parameters.get(name) in self.weights else {}
        if self.observations:
            self.observations.check({key: tensor})
        target = self.targets.get(name)
        if target is None:
            tensor = tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
            return Piece(name, base, tensors={name: tensor})
        matrix = target.to_matrix(tensor.to(self.device))
        rank, observed = self.recipe.rank_of(target.module), self.seen(self.parameters.get(name, name))
        split = split_by(self.recipe, matrix, target.weight, dtype, rank=rank, observed=observed)
        stored = store(target.weight, split, FACTOR_DTYPE, dtype)
        pair = factors.file_tensors(target, stored.split.left_core, stored.split.right)
        start = {factor_name: factor.to("cpu", FACTOR_DTYPE).contiguous() for factor_name, factor in pair.items()}
        if stored.split.core is not None:
            parts = {
                f"{target.module}.{part}": tensor
                for part, tensor in stored.split.start.to(FACTOR_DTYPE).named().items()
            }
            start |= {part_name: tensor.cpu().contiguous() for part_name, tensor in parts.items()}
        if target.module in self.packed and stored.split.quantised:
            parts = {part: tensor.cpu() for part, tensor in stored.split.quantised.parts.items()}
        else:
            parts = {"weight": target.from_matrix(stored.frozen.to("cpu")).contiguous()}
        names, keys = packed_names(name, parts), packed_names(key, parts)
        residual = {keys[part]: tensor_digests(tensor) for part, tensor in parts.items()}
        tensors = {names[part]: tensor for part, tensor in parts.items()}
        return Piece(name, base, residual, stored.layer, {**tensors, **start})

    def record(self, pieces: list[Piece]) -> Record:
        """The record of kind "residual"."""
        base: dict[str, Digests] = {}
        residual: dict[str, Digests] = {}
        for piece in pieces:
            base |= piece.base
            residual |= piece.residual
        source = self.checkpoint
        name = str(source.folder.resolve()) if Path(source.name).is_dir() else source.name
        origin = Base(name, source.revision, combined(base), base)
        layers = [piece.layer for piece in pieces if piece.layer]
        notes = {"observed": self.observations.facts} if self.observations else {}
        return Record("residual", self.recipe, origin, layers, residual, notes, versions())
