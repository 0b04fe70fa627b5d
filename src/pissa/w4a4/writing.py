"""A 4-bit model on disk, written one tensor at a time.

    OUT/  config.json  tokenizer…  pissa.json        weights/  model*.safetensors

The weights are in a folder of their own because transformers skips a quantisation it does not know: beside config.json
it would load them, take the 4-bit layers for absent and fill them with random numbers. As it is, it finds no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pissa.adapters import plain
from pissa.adapters.storing import describe
from pissa.checkpoint.fingerprint import Digests, canonical, combined, tensor_digests
from pissa.checkpoint.layout import Spec, plan_bytes
from pissa.checkpoint.output import staged_output, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import ALL_LINEAR, Target, find_targets
from pissa.checkpoint.writer import CheckpointWriter, parse_bytes
from pissa.errors import InputError
from pissa.linalg import frobenius, relative_error
from pissa.linalg.int4 import GROUP
from pissa.observe import Observations
from pissa.records import Base, Layer, Recipe, Record, versions
from pissa.registry import get
from pissa.surgery.decomposition import Progress
from pissa.surgery.pipeline import check_workers, in_order
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.model import check_targets, split_layer

KIND, WEIGHTS = "w4a4", "weights"


def svdquant(
    source: str | Path,
    out: str | Path,
    observations: Observations,
    rank: int = 32,
    *,
    targets: str | Iterable[str] = ALL_LINEAR,
    svd: str | float = "fast",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    workers: int | None = None,
    max_shard_bytes: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write a checkpoint whose targets compute in 4 bits, as many tensors in memory as there are workers.

    Args:
        source: a folder or a Hub id, in 16 or 32 bits.
        out: the folder to write; it appears whole or not at all.
        observations: what entered the targets while this model read calibration rows.
        rank: of the branches, 1 to min(out, in) of the smallest target.
        targets: "all-linear", module names or endings, or a regular expression; linear layers and GPT-2's.
        svd: "fast", "exact" or a tolerance.
        seed: fixes every random number together with the tensors' names.
        options: the method's: smoothing, rounds.
        workers: tensors worked on side by side, which the output does not depend on.
        max_shard_bytes: size of an output file.
        revision: of a Hub id.
        trust_remote_code: whether the model's own code may run.
        force: replace `out`.
        progress: told after every tensor.

    Returns:
        The record that was written as `pissa.json`; `notes["output_errors"]` has each layer's relative output error on
        the rows that were observed.

    Raises:
        InputError, CheckpointError, WrongBaseError, OutputError: before `out` exists, naming the tensor.
    """
    shard_bytes = parse_bytes(max_shard_bytes)
    check_workers(workers)
    checked = get("svdquant").checked(options)
    checkpoint = Checkpoint.open(source, revision)
    _refuse_unfit(checkpoint)
    skeleton = build_skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    found = find_targets(skeleton, targets)
    check_targets(found, rank)
    kinds = {target.module: target.kind for target in found}
    recipe = Recipe("svdquant", rank, float(rank), svd, seed, KIND, kinds, options=checked)
    job = _Job(checkpoint, skeleton, found, recipe, observations)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    done, pieces = 0, []
    with staged_output(out, force=force, needs_bytes=plan_bytes(job.plan), inputs=[checkpoint.folder]) as folder:
        with CheckpointWriter(folder / WEIGHTS, job.plan, shard_bytes) as writer:
            for piece in in_order(job.piece, checkpoint.tensors, workers):
                for name, tensor in piece.tensors.items():
                    writer.write(name, tensor)
                piece.tensors.clear()
                pieces.append(piece)
                done += checkpoint.tensors[piece.name].nbytes
                if progress:
                    progress(piece.name, done, total)
        record = job.record(pieces)
        job.write_config(folder)
        write_json(folder / plain.RECORD, record.to_json())
    return record


@dataclass(frozen=True)
class _Piece:
    """One tensor of the base on its way: digests under its canonical name, a target's line, what is written."""

    name: str
    base: dict[str, Digests]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layer: Layer | None = None
    output_error: float = 0.0


class _Job:
    """Which stored tensor becomes what, under the names of the model's own state dict."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: nn.Module,
        found: list[Target],
        recipe: Recipe,
        observations: Observations,
    ) -> None:
        self.checkpoint, self.recipe, self.observations = checkpoint, recipe, observations
        self.prefix = getattr(skeleton, "base_model_prefix", "")
        self.parameters = parameter_names(skeleton, checkpoint.tensors)
        self.targets = stored_targets(found, self.parameters, checkpoint.folder)
        self.weights = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
        self.plan = {key: spec for name in checkpoint.tensors for key, spec in self.planned(name).items()}

    def planned(self, name: str) -> dict[str, Spec]:
        """What takes a tensor's place."""
        target, info = self.targets.get(name), self.checkpoint.tensors[name]
        if target is None:
            return {self.parameters.get(name, name): (info.dtype, info.shape)}
        rows, columns = target.matrix_shape
        empty = W4A4Linear(columns, rows, self.recipe.rank, device="meta").state_dict()
        return {f"{target.module}.{key}": (part.dtype, tuple(part.shape)) for key, part in empty.items()}

    def piece(self, name: str) -> _Piece:
        """Read one tensor, and put a target in 4 bits."""
        tensor, parameter = self.checkpoint.read(name), self.parameters.get(name, name)
        key = canonical(parameter, self.prefix)
        base = {key: tensor_digests(tensor)} if parameter in self.weights else {}
        target = self.targets.get(name)
        if target is None:
            return _Piece(name, base, {parameter: tensor})
        self.observations.check({key: tensor})
        matrix, inputs = target.to_matrix(tensor), self.observations.get("inputs", key)
        how = self.recipe
        split = split_layer(
            matrix, inputs, how.rank, name=target.weight, svd=how.svd, seed=how.seed, options=how.options
        )
        layer = W4A4Linear.from_split(split)
        rows, wide = inputs.float(), matrix.float()
        line = describe(target.weight, split, frobenius(wide - layer.dense()))
        tensors = {f"{target.module}.{key}": part for key, part in layer.state_dict().items()}
        return _Piece(name, base, tensors, line, relative_error(layer(rows), rows @ wide.T))

    def record(self, pieces: list[_Piece]) -> Record:
        """The record of kind "w4a4"."""
        digests = {key: value for piece in pieces for key, value in piece.base.items()}
        source = self.checkpoint
        name = str(source.folder.resolve()) if Path(source.name).is_dir() else source.name
        layers = [piece.layer for piece in pieces if piece.layer]
        errors = {piece.layer.name: piece.output_error for piece in pieces if piece.layer}
        origin = Base(name, source.revision, combined(digests), digests)
        return Record(KIND, self.recipe, origin, layers, notes={"output_errors": errors}, versions=versions())

    def write_config(self, folder: Path) -> None:
        """Config and tokenizer of the base; the config says what the weights are."""
        for file in self.checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        modules = list(self.recipe.targets)
        config["pissa"] = {"kind": KIND, "rank": self.recipe.rank, "group": GROUP, "modules": modules}
        write_json(folder / "config.json", config)


def _refuse_unfit(checkpoint: Checkpoint) -> None:
    if "pissa" in checkpoint.config or "quantization_config" in checkpoint.config:
        raise InputError(
            f"{checkpoint.name} was decomposed or quantised before (its config.json says so), and what that lost "
            "cannot be had back: start from the original model in 16 bits"
        )
