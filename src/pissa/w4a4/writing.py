"""A 4-bit model on disk, written one tensor at a time.

    OUT/  config.json  tokenizer…  pissa.json        weights/  model*.safetensors

The weights are in a folder of their own because transformers skips a quantisation it does not know:
beside config.json it would load them, take the 4-bit layers for absent and fill them with random
numbers. As it is, it finds no weights.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from torch import nn

from pissa.adapters import plain
from pissa.adapters.storing import describe
from pissa.checkpoint.fingerprint import canonical, combined, tensor_digests
from pissa.checkpoint.layout import Plan
from pissa.checkpoint.output import write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, find_targets
from pissa.checkpoint.writer import parse_bytes
from pissa.errors import InputError
from pissa.jobs import FourBitSettings
from pissa.keywords import spelled_out
from pissa.linalg import frobenius, relative_error
from pissa.linalg.int4 import GROUP
from pissa.method import Method
from pissa.observe import Observations
from pissa.presets import find
from pissa.records import Base, Layer, Recipe, Record, versions
from pissa.surgery.pipeline import check_workers
from pissa.surgery.streaming import SHARDS, Piece, StreamJob
from pissa.untyped import Json
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.model import SVDQUANT, check_targets

KIND, WEIGHTS = "w4a4", "weights"


@spelled_out(FourBitSettings)
def svdquant(source: str | Path, out: str | Path, settings: FourBitSettings) -> Record:
    """Write a checkpoint whose targets compute in 4 bits, as many tensors in memory as there are
    workers.

    A run that was killed goes on when it is called again in the same way, and ends with the same
    bits.

    Args:
        source: a folder or a Hub id, in 16 or 32 bits.
        out: the folder to write; it appears whole or not at all.
        settings: a keyword argument each, see `pissa.jobs`.

    Returns:
        The record that was written as `pissa.json`; `notes["output_errors"]` has each layer's
        relative output error on the rows that were observed.

    Raises:
        InputError, CheckpointError, WrongBaseError, OutputError: before `out` exists, naming the
            tensor.
    """
    asked = settings
    shard_bytes = parse_bytes(asked.max_shard_bytes)
    check_workers(asked.workers)
    method = find(SVDQUANT)
    checked = method.checked(asked.options)
    checkpoint = Checkpoint.open(source, asked.revision)
    _refuse_unfit(checkpoint)
    skeleton = build_skeleton(checkpoint.folder, trust_remote_code=asked.trust_remote_code)
    found = find_targets(skeleton, asked.targets)
    check_targets(found, asked.rank)
    kinds = {target.module: target.kind for target in found}
    alpha = float(asked.rank)
    recipe = Recipe(
        method.name, asked.rank, alpha, asked.svd, asked.seed, KIND, kinds, options=checked
    )
    job = _Job(checkpoint, skeleton, found, recipe, method, asked.observations, shard_bytes)
    return job.into(out, force=asked.force, workers=asked.workers, progress=asked.progress)


class _Job(StreamJob):
    """Which stored tensor becomes what, under the names of the model's own state dict."""

    folder = WEIGHTS

    def __init__(
        self,
        checkpoint: Checkpoint,
        skeleton: nn.Module,
        found: list[Target],
        recipe: Recipe,
        method: Method,
        observations: Observations,
        shard_bytes: int,
    ) -> None:
        self.checkpoint, self.recipe, self.method = checkpoint, recipe, method
        self.observations, self.shard_bytes = observations, shard_bytes
        self.prefix = getattr(skeleton, "base_model_prefix", "")
        self.parameters = parameter_names(skeleton, checkpoint.tensors)
        self.targets = stored_targets(found, self.parameters, checkpoint.folder)
        self.weights = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}

    def planned(self, name: str) -> dict[str, Plan]:
        """What takes a tensor's place."""
        target, info = self.targets.get(name), self.checkpoint.tensors[name]
        if target is None:
            return {SHARDS: {self.parameters.get(name, name): (info.dtype, info.shape)}}
        rows, columns = target.matrix_shape
        empty = W4A4Linear(columns, rows, self.recipe.rank, device="meta").state_dict()
        return {
            SHARDS: {
                f"{target.module}.{key}": (p.dtype, tuple(p.shape)) for key, p in empty.items()
            }
        }

    def facts(self) -> Json:
        """Recipe and observations."""
        return {"recipe": asdict(self.recipe), "observed": self.observations.digest()}

    def piece(self, name: str) -> Piece:
        """Read one tensor, and put a target in 4 bits."""
        tensor, parameter = self.checkpoint.read(name), self.parameters.get(name, name)
        key = canonical(parameter, self.prefix)
        base = {key: tensor_digests(tensor)} if parameter in self.weights else {}
        target = self.targets.get(name)
        if target is None:
            return Piece(name, {parameter: tensor}, {"base": base})
        self.observations.check({key: tensor})
        matrix, inputs = target.to_matrix(tensor), self.observations.get("inputs", key)
        how = self.recipe
        split = self.method.split(
            matrix,
            how.rank,
            svd=how.svd,
            seed=how.seed,
            name=target.weight,
            observed=inputs,
            options=how.options,
        )
        layer = W4A4Linear.from_split(split)
        rows, wide = inputs.float(), matrix.float()
        line = describe(target.weight, split, frobenius(wide - layer.dense()))
        tensors = {f"{target.module}.{key}": part for key, part in layer.state_dict().items()}
        error = relative_error(layer(rows), rows @ wide.T)
        return Piece(name, tensors, {"base": base, "layer": asdict(line), "output_error": error})

    def finish(self, staging: Path, final: Path, pieces: list[Piece]) -> Record:
        """Config, tokenizer and the record."""
        record = self.record(pieces)
        self.write_config(staging)
        write_json(staging / plain.RECORD, record.to_json())
        return record

    def record(self, pieces: list[Piece]) -> Record:
        """The record of kind "w4a4"."""
        digests = {key: value for piece in pieces for key, value in piece.facts["base"].items()}
        source = self.checkpoint
        name = str(source.folder.resolve()) if Path(source.name).is_dir() else source.name
        split = [piece.facts for piece in pieces if "layer" in piece.facts]
        layers = [Layer(**facts["layer"]) for facts in split]
        errors = {facts["layer"]["name"]: facts["output_error"] for facts in split}
        origin = Base(name, source.revision, combined(digests), digests)
        return Record(
            KIND, self.recipe, origin, layers, notes={"output_errors": errors}, versions=versions()
        )

    def write_config(self, folder: Path) -> None:
        """Config and tokenizer of the base; the config says what the weights are."""
        for file in self.checkpoint.companions():
            shutil.copyfile(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        modules = list(self.recipe.targets)
        config["pissa"] = {
            "kind": KIND,
            "rank": self.recipe.rank,
            "group": GROUP,
            "modules": modules,
        }
        write_json(folder / "config.json", config)


def _refuse_unfit(checkpoint: Checkpoint) -> None:
    if "pissa" in checkpoint.config or "quantization_config" in checkpoint.config:
        raise InputError(
            f"{checkpoint.name} was decomposed or quantised before (its config.json says so), and what that lost "
            "cannot be had back: start from the original model in 16 bits"
        )
