"""Checkpoint to checkpoint: the residual as an ordinary Hugging Face folder, the start beside it in `pissa_init/`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.adapters import factors, plain
from pissa.adapters.plain import INIT
from pissa.adapters.storing import store
from pissa.checkpoint.fingerprint import Digests, canonical, combined, tensor_digests
from pissa.checkpoint.layout import plan_bytes
from pissa.checkpoint.output import staged_output, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, find_targets, short_names
from pissa.checkpoint.writer import CheckpointWriter, TensorFile, parse_bytes
from pissa.errors import CheckpointError, InputError, WrongBaseError
from pissa.records import Base, Layer, Recipe, Record, versions
from pissa.registry import Method, check_rank, get, scale_of
from pissa.surgery.pipeline import check_workers, in_order

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTOR_DTYPE = torch.float32
Progress = Callable[[str, int, int], None]
"""Called with a tensor's name, the bytes done and the bytes in all."""


def decompose(
    source: str | Path,
    out: str | Path,
    method: str = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    targets: str | Iterable[str] = "all-linear",
    svd: str | float = "fast",
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    max_shard_bytes: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Split every target of a checkpoint, as many tensors in memory as there are workers.

    Args:
        source: a folder or a Hub id.
        out: the folder to write; it appears whole or not at all.
        method: a name listed by `pissa methods`.
        rank: 1 to min(out, in) of the smallest target.
        alpha: above 0; by default `rank`, which makes the scale 1.
        targets: "all-linear", module names or endings, or a regular expression.
        svd: "fast", "exact" (certified to 1e-5) or a tolerance to certify.
        seed: fixes every random number together with the tensors' names.
        dtype: "float32", "bfloat16" or "float16" for the residual; as stored by default.
        device: where the algebra runs.
        workers: tensors worked on side by side, which the output does not depend on; one a core, up to 4, by default.
        max_shard_bytes: size of an output file, a number or "500MB".
        revision: of a Hub id.
        trust_remote_code: whether the model's own code may run; off by default.
        force: replace `out` if it exists.
        progress: told after every tensor.

    Returns:
        The record that was written as `pissa.json`.

    Raises:
        InputError, CheckpointError, WrongBaseError, OutputError: before `out` exists, naming tensor or key.
    """
    chosen, scale = get(method), scale_of(alpha, rank)
    check_dtype(dtype)
    check_workers(workers)
    shard_bytes = parse_bytes(max_shard_bytes)
    checkpoint = Checkpoint.open(source, revision)
    _refuse_unfit(checkpoint)
    skeleton = build_skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    found = find_targets(skeleton, targets)
    for target in found:
        check_rank(rank, target.matrix_shape, target.weight)
    parameters = parameter_names(skeleton, checkpoint.tensors)
    by_tensor = stored_targets(found, parameters, checkpoint.folder)
    _refuse_other_shapes(checkpoint, by_tensor)
    recipe = Recipe(
        method, rank, float(rank if alpha is None else alpha), svd, seed, "residual", {t.module: t.kind for t in found}
    )
    job = _Job(checkpoint, skeleton, parameters, by_tensor, recipe, chosen, scale, device)
    job.residual_plan = {
        name: (output_dtype(info.dtype, dtype), info.shape) for name, info in checkpoint.tensors.items()
    }
    folder = Path(out)
    with staged_output(folder, force=force, needs_bytes=job.bytes_needed(), inputs=[checkpoint.folder]) as staging:
        return job.write(staging, folder, shard_bytes, workers, progress)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One tensor's way into the output: what is written of it and what is noted."""

    name: str
    key: str
    frozen: Tensor
    base_digests: Digests | None
    residual_digests: Digests | None = None
    start: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    layer: Layer | None = None


@dataclasses.dataclass
class _Job:
    """One decomposition on its way through the checkpoint."""

    checkpoint: Checkpoint
    skeleton: nn.Module
    parameters: dict[str, str]
    targets: dict[str, Target]
    recipe: Recipe
    method: Method
    scale: float
    device: str
    residual_plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = dataclasses.field(default_factory=dict)

    def start_plan(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of `pissa_init/`."""
        plan = {}
        for target in self.targets.values():
            for key, shape in zip(
                factors.file_keys(target), factors.file_shapes(target, self.recipe.rank), strict=True
            ):
                plan[key] = (FACTOR_DTYPE, shape)
        return plan

    def bytes_needed(self) -> int:
        """What the output will take on disk, less headers and small files."""
        return plan_bytes(self.residual_plan) + plan_bytes(self.start_plan())

    def write(
        self, staging: Path, final: Path, shard_bytes: int, workers: int | None, progress: Progress | None
    ) -> Record:
        """Stream all tensors, then the small files, `pissa.json` last."""
        init = staging / INIT
        init.mkdir()
        total = sum(info.nbytes for info in self.checkpoint.tensors.values())
        done = 0
        base, frozen, layers = {}, {}, []
        with ExitStack() as stack:
            residual = stack.enter_context(CheckpointWriter(staging, self.residual_plan, shard_bytes))
            start = stack.enter_context(TensorFile(init / plain.WEIGHTS, self.start_plan()))
            for piece in in_order(self.split_tensor, self.checkpoint.tensors, workers):
                residual.write(piece.name, piece.frozen)
                for factor_name, factor in piece.start.items():
                    start.write(factor_name, factor)
                if piece.base_digests:
                    base[piece.key] = piece.base_digests
                if piece.layer and piece.residual_digests:
                    frozen[piece.key] = piece.residual_digests
                    layers.append(piece.layer)
                done += self.checkpoint.tensors[piece.name].nbytes
                if progress:
                    progress(piece.name, done, total)
        record = self.record(base, frozen, layers)
        self.write_small_files(staging, final, record)
        return record

    def split_tensor(self, name: str) -> _Piece:
        """What takes the tensor's place in the residual, and the start where it is a target."""
        tensor, dtype = self.checkpoint.read(name), self.residual_plan[name][0]
        key = canonical(self.parameters.get(name, name), getattr(self.skeleton, "base_model_prefix", ""))
        digests = tensor_digests(tensor) if name in self.parameters else None
        target = self.targets.get(name)
        if target is None:
            return _Piece(name, key, tensor.to(dtype) if tensor.dtype.is_floating_point else tensor, digests)
        matrix, recipe = target.to_matrix(tensor.to(self.device)), self.recipe
        split = self.method.split(
            matrix, recipe.rank, scale=self.scale, svd=recipe.svd, seed=recipe.seed, name=target.weight
        )
        stored = store(target.weight, split, FACTOR_DTYPE, dtype)
        pair = factors.file_tensors(target, stored.split.left, stored.split.right)
        start = {factor_name: factor.to("cpu", FACTOR_DTYPE).contiguous() for factor_name, factor in pair.items()}
        frozen = target.from_matrix(stored.frozen.to("cpu")).contiguous()
        return _Piece(name, key, frozen, digests, tensor_digests(frozen), start, stored.layer)

    def record(self, base: dict[str, Digests], frozen: dict[str, Digests], layers: list[Layer]) -> Record:
        """The record of kind "residual"."""
        source = self.checkpoint
        name = str(source.folder.resolve()) if Path(source.name).is_dir() else source.name
        origin = Base(name, source.revision, combined(base), base)
        return Record("residual", self.recipe, origin, layers, frozen, versions=versions())

    def write_small_files(self, staging: Path, final: Path, record: Record) -> None:
        """Config, tokenizer, adapter config; the records last."""
        for file in self.checkpoint.companions():
            shutil.copyfile(file, staging / file.name)
        config = json.loads((staging / "config.json").read_text())
        assert record.base is not None
        # transformers carries unknown keys along, so the residual says what it is wherever it is saved again.
        config["pissa"] = {
            "kind": "residual",
            "base": record.base.name,
            "method": self.recipe.method,
            "rank": self.recipe.rank,
            "fingerprint": record.base.fingerprint,
        }
        stored = {dtype for name, (dtype, _) in self.residual_plan.items() if name in self.targets}
        config["dtype"] = str(next(iter(stored))).removeprefix("torch.")
        config.pop("torch_dtype", None)
        write_json(staging / "config.json", config)
        write_json(staging / INIT / plain.CONFIG, self.init_config(final))
        write_json(staging / INIT / plain.RECORD, dataclasses.replace(record, kind="init").to_json())
        write_json(staging / plain.RECORD, record.to_json())

    def init_config(self, final: Path) -> dict[str, Any]:
        """The adapter config of the start: it names the residual's folder, where alone it is right."""
        found = list(self.targets.values())
        name = type(self.skeleton).__name__
        return plain.adapter_config(
            rank=self.recipe.rank,
            alpha=self.recipe.alpha,
            base=str(final.resolve()),
            revision=None,
            target_modules=short_names(found, self.skeleton),
            transposed="conv1d" in {target.kind for target in found},
            task_type="CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        )


def check_dtype(asked: str | None) -> None:
    """Refuse what cannot be asked of an output."""
    if asked is not None and asked not in STORED:
        raise InputError(f"dtype is {asked!r}, expected one of {', '.join(STORED)}")


def output_dtype(own: torch.dtype, asked: str | None) -> torch.dtype:
    """What a tensor is written in: as asked, or as it is where nothing is asked or it holds no floats."""
    return STORED[asked] if asked and own.is_floating_point else own


def _refuse_other_shapes(checkpoint: Checkpoint, targets: dict[str, Target]) -> None:
    for name, target in targets.items():
        got = checkpoint.tensors[name].shape
        if got != target.shape:
            raise CheckpointError(
                f"`{name}` is {list(got)} in {checkpoint.name}, expected {list(target.shape)} from its config.json: "
                "config and weights are of different models, fetch both again"
            )


def _refuse_unfit(checkpoint: Checkpoint) -> None:
    note = checkpoint.config.get("pissa")
    if isinstance(note, dict) and note.get("kind") == "residual":
        raise WrongBaseError(
            f"{checkpoint.name} is itself a residual, of {note.get('base')!r}: decompose that original model instead"
        )
    quantised = checkpoint.config.get("quantization_config")
    if quantised:
        raise InputError(
            f"{checkpoint.name} is quantised ({quantised.get('quant_method', 'unknown method')} in config.json): "
            "decompose the 16-bit model it was made from"
        )
