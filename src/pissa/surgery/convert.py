"""A run, or a pair trained elsewhere, as a plain LoRA for the original base: exact, or the best of a given rank."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.adapters.plain import INIT
from pissa.checkpoint.fingerprint import canonical, check_tensor
from pissa.checkpoint.output import read_json, staged_output
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError, InputError, WrongBaseError
from pissa.jobs import ConvertSettings
from pissa.keywords import spelled_out
from pissa.presets import find
from pissa.records import Base, Recipe, Record, versions
from pissa.splits import Factors, Lora, drift_as_lora
from pissa.surgery import beside_residual
from pissa.surgery.folders import RESIDUAL, Changes, adapter_scale, adapter_targets, read_changes
from pissa.untyped import Json

Pairs = dict[Target, tuple[Tensor, Tensor]]
LEAST_SHARE = 0.5
"""A trained factor holds its own start once, a foreign start only by chance; MiLoRA's may move far beyond its norm."""


@spelled_out(ConvertSettings)
def convert(run: str | Path, out: str | Path, settings: ConvertSettings) -> Record:
    """Write a plain LoRA adapter that any tool loads on the original base.

    A run beside a quantized residual has no exact one, only the best of a rank.

    Args:
        run: a run, its state/ or a plain LoRA; with `start`, an adapter that stock peft trained on
            a residual.
        out: the folder to write.
        settings: a keyword argument each, see `pissa.jobs`.

    Returns:
        The record; `notes["error"]` is the relative error of the change (0 when exact).

    Raises:
        WrongBaseError: another base, or an adapter that was trained from another start.
        InputError, CheckpointError, OutputError: as everywhere.
    """
    run, rank, base = Path(run), settings.rank, settings.base
    start = settings.start
    found = read_changes(run) if start is None else changes_since(run, Path(start), base)
    record = found.record or Record(
        "lora", base=Base(str(base or found.config.get("base_model_name_or_path", "unknown")))
    )
    if base is not None:
        check_folder(record, Path(base), f"the change in {run}")
    if rank is None and record.recipe and find(record.recipe.method).full_rank:
        raise InputError(
            f"the change in {run} has full rank, and its exact LoRA is larger than the model: use pissa merge for all "
            "of it, or --rank K for the best of a rank"
        )
    if record.beside:
        changes, error = _beside_residual(found, record, rank, base, run)
        record = beside_residual.on_the_base(record)
    else:
        changes, error = _at_rank(found.changes, rank)
    notes = {
        **record.notes,
        "error": error,
        "rank": max(change.rank for change in changes.values()),
    }
    record = dataclasses.replace(record, kind="lora", notes=notes, versions=versions())
    made_of, kinds = record.made_of(str(run)), {target.kind for target in changes}
    config = plain.adapter_config(
        rank=1,
        alpha=1,
        base=made_of.name,
        revision=made_of.revision,
        target_modules=notes.get("target_modules") or found.config["target_modules"],
        transposed="conv1d" in kinds,
        task_type=notes.get("task_type") or found.config.get("task_type"),
        modules_to_save=notes.get("modules_to_save") or found.config.get("modules_to_save"),
    )
    with staged_output(out, force=settings.force, inputs=[run]) as folder:
        plain.write_plain_lora(folder, changes, found.extras, config, record)
    return record


def changes_since(adapter: Path, start: Path, base: str | Path | None) -> Changes:
    """The change of an adapter that any tool trained from a stored start: the drift of its factors.

    Raises:
        WrongBaseError: the adapter does not come from this start.
    """
    if (start / INIT).is_dir():
        start = start / INIT
    config, start_config = read_json(adapter / plain.CONFIG), read_json(start / plain.CONFIG)
    trained = adapter_targets(config, Checkpoint.open(adapter, need_config=False))
    begun = adapter_targets(start_config, Checkpoint.open(start, need_config=False))
    scale, start_scale = adapter_scale(config, adapter), adapter_scale(start_config, start)
    if set(trained) != set(begun) or scale != start_scale:
        odd = sorted(target.weight for target in set(trained) ^ set(begun))
        raise WrongBaseError(
            f"{adapter} was not trained from {start}: "
            + (
                f"`{odd[0]}` is in only one of them"
                if odd
                else f"its scale is {scale}, the start's {start_scale}"
            )
        )
    _refuse_other_start(adapter, start, config, begun)
    record = _start_record(start, config, list(trained), base)
    changes: dict[Target, Lora] = {}
    for target, (left, right) in trained.items():
        left0, right0 = begun[target]
        for factor, factor0, side in ((left, left0, "left"), (right, right0, "right")):
            if factor.shape != factor0.shape or _started_elsewhere(
                factor.double(), factor0.double()
            ):
                raise WrongBaseError(
                    f"{adapter} was not trained from {start}: the {side} factor of `{target.weight}` "
                    f"{list(factor.shape)} does not hold the start's {list(factor0.shape)}. "
                    "Name the pissa_init/ folder that lay beside the residual in training"
                )
        if record.beside:
            changes[target] = Lora(right.float(), scale * left.float())
            continue
        begin, drift = Factors(left0, right0), Factors(left - left0, right - right0)
        changes[target] = drift_as_lora(begin.to(torch.float32), drift.to(torch.float32), scale)
    checkpoint = Checkpoint.open(adapter, need_config=False)
    extras = {name: checkpoint.read(name) for name in checkpoint.tensors if ".lora_" not in name}
    return Changes(changes, extras, record, config)


def _refuse_other_start(adapter: Path, start: Path, config: Json, begun: Pairs) -> None:
    """Where the residual that the adapter names is at hand, its own start must be the given one."""
    named = Path(str(config.get("base_model_name_or_path") or "")) / INIT
    if not (named / plain.WEIGHTS).is_file() or named.resolve() == start.resolve():
        return
    own = adapter_targets(
        read_json(named / plain.CONFIG), Checkpoint.open(named, need_config=False)
    )
    for target, factors in begun.items():
        if target not in own or not all(map(torch.equal, factors, own[target])):
            raise WrongBaseError(
                f"{adapter} was not trained from {start}: it names the residual {named.parent}, whose start of "
                f"`{target.weight}` is another one. Use --start {named}"
            )


def _started_elsewhere(trained: Tensor, start: Tensor) -> bool:
    """Whether the start's share in a trained factor (1 where training only added to it) is too small for chance."""
    norm = float(torch.linalg.vector_norm(start))
    if norm == 0:
        return False
    share = float((trained * start).sum()) / norm**2
    chance = float(torch.linalg.vector_norm(trained)) / norm / trained.numel() ** 0.5
    return bool(share + 4 * chance < LEAST_SHARE)


def check_folder(record: Record, folder: Path, what: str) -> None:
    """Compare a base on disk with the one a record names, tensor by tensor.

    Raises:
        WrongBaseError: naming the first tensor that differs, both digests and what to do.
    """
    base = record.made_of(what)
    if not base.tensors:
        warnings.warn(f"{what} carries no fingerprint: {folder} cannot be checked", stacklevel=3)
        return
    checkpoint = Checkpoint.open(folder)
    missing = dict(base.tensors)
    for key, name in canonical_names(checkpoint).items():
        if key in missing:
            check_tensor(
                key, missing.pop(key), checkpoint.read(name), what=what, advice=f"Use {base.name}"
            )
    if missing:
        raise WrongBaseError(
            f"{what} was made for another base: tensor `{next(iter(missing))}` is absent from {folder}. Use {base.name}"
        )


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Canonical name to the tensor's name in the checkpoint."""
    skeleton = build_skeleton(checkpoint.folder)
    prefix = getattr(skeleton, "base_model_prefix", "")
    parameters = parameter_names(skeleton, checkpoint.tensors)
    return {canonical(parameters.get(name, name), prefix): name for name in checkpoint.tensors}


def _beside_residual(
    found: Changes, record: Record, rank: int | None, base: str | Path | None, run: Path
) -> tuple[dict[Target, Lora], float]:
    made_of, served_on = record.made_of(str(run)), record.served_on
    if rank is None or served_on is None:
        raise beside_residual.no_exact(record, run)
    _check_rank(rank)
    if base is None:
        check_folder(record, Path(made_of.name), f"the change in {run}")
    residual = Path(served_on.name)
    if not residual.is_dir() and (run / RESIDUAL).is_dir():
        residual = run / RESIDUAL  # a run that was moved
    if not residual.is_dir():
        raise InputError(
            f"{run} was trained beside {residual}, which is gone: put it back there, or to {run / RESIDUAL}"
        )
    check_folder(dataclasses.replace(record, base=served_on), residual, f"the factors in {run}")
    return beside_residual.best_changes(found, rank, Path(base or made_of.name), residual)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise InputError(
            f"rank {rank} is below 1: use --rank 1 or more, or leave it out for the exact change"
        )


def _at_rank(changes: dict[Target, Lora], rank: int | None) -> tuple[dict[Target, Lora], float]:
    """The changes at `rank`, and the error over all weights relative to the whole change."""
    if rank is None:
        return changes, 0.0
    _check_rank(rank)
    approximations, missed, total = {}, 0.0, 0.0
    for target, change in changes.items():
        approximations[target], error = change.truncated(rank)
        norm = float(torch.linalg.vector_norm(change.delta(), dtype=torch.float64))
        missed, total = missed + (error * norm) ** 2, total + norm**2
    return approximations, (missed / total) ** 0.5 if total else 0.0


def _start_record(
    start: Path, config: Json, targets: list[Target], base: str | Path | None
) -> Record:
    if (start / plain.RECORD).is_file():
        record = Record.from_json(read_json(start / plain.RECORD), str(start / plain.RECORD))
        if record.kind != "init":
            raise CheckpointError(
                f"{start} is a {record.kind!r} folder, expected the pissa_init/ of a decomposition"
            )
    else:
        if base is None:
            warnings.warn(
                f"{start} has no pissa.json: the original base is unknown. Name it with --base, or edit "
                "base_model_name_or_path in the result",
                stacklevel=4,
            )
        kinds = {target.module: target.kind for target in targets}
        recipe = Recipe("pissa", config["r"], config["lora_alpha"], "unknown", 0, "residual", kinds)
        record = Record("init", recipe, Base(str(base or "unknown")))
    shapes = {target.module: list(target.shape) for target in targets}
    notes = {
        "target_modules": config["target_modules"],
        "task_type": config.get("task_type"),
        "shapes": shapes,
        "residual": str(start.resolve().parent),
    }
    return dataclasses.replace(record, notes={**record.notes, **notes})
