"""A decomposed folder in memory: its residual model with the start from `pissa_init/`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from pissa.adapters import factors, plain
from pissa.adapters.attach import Attachment, is_residual, plain_model, wrap
from pissa.adapters.plain import INIT
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.output import read_json
from pissa.checkpoint.targets import Target, find_targets, head_modules, plain_modules
from pissa.errors import CheckpointError, WrongBaseError
from pissa.records import Base, Recipe, Record
from pissa.registry import get
from pissa.splits import Factors


def read_pairs(folder: Path, targets: dict[str, Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """(left, right) of each target by its module from a stock adapter file, unscaled.

    Args:
        folder: of the adapter.
        targets: by the module's name in the file.

    Raises:
        CheckpointError: a target without its pair, naming the key.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with safe_open(folder / plain.WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name_there, target in targets.items():
            key_left, key_right = factors.file_keys(dataclasses.replace(target, module=name_there))
            missing = {key_left, key_right} - names
            if missing:
                raise CheckpointError(f"{folder / plain.WEIGHTS} lacks `{sorted(missing)[0]}`")
            found[target.module] = tuple(file.get_tensor(key).flatten(1) for key in (key_left, key_right))  # type: ignore[assignment]
    return found


def read_starts(folder: Path, targets: dict[str, Target], recipe: Recipe) -> dict[str, Factors]:
    """The start of each target by its module: the stock pair, or for a core the parts that lie beside it.

    Args:
        folder: `pissa_init/`.
        targets: by the module's name in the files.
        recipe: of the start.

    Raises:
        CheckpointError: a part that is not there, naming the key.
    """
    if not get(recipe.method).has_core:
        return {module: Factors(*pair) for module, pair in read_pairs(folder, targets).items()}
    found = {}
    with safe_open(folder / plain.START, framework="pt") as file:
        names = set(file.keys())
        for name_there, target in targets.items():
            parts = [part for part in ("left", "right", "core", "pattern") if f"{name_there}.{part}" in names]
            if not {"left", "right"} <= set(parts):
                raise CheckpointError(f"{folder / plain.START} lacks a factor of `{name_there}`: decompose again")
            found[target.module] = Factors(**{part: file.get_tensor(f"{name_there}.{part}") for part in parts})
    return found


def load_initial(
    model: nn.Module, folder: Path, adapter: str, modules_to_save: Iterable[str] | None = None
) -> PeftModel:
    """Put the start of a decomposed folder on its residual model; see `pissa.load`.

    Raises:
        WrongBaseError: the model is not the residual that was written beside this start.
    """
    initial = folder / INIT
    config = read_json(initial / plain.CONFIG)
    if (initial / plain.RECORD).is_file():
        record = Record.from_json(read_json(initial / plain.RECORD), str(initial / plain.RECORD))
        if not check_base(record, model, f"the start in {initial}"):
            raise WrongBaseError(
                f"the start in {initial} belongs on the residual model, but this is the original base: "
                f"load the model from {folder}, or use pissa.attach on the base"
            )
    else:
        record = _foreign_record(config, model, folder)
    assert record.recipe is not None
    heads = head_modules(model) if modules_to_save is None else sorted(modules_to_save)
    names = _names_here(model, record.recipe.targets)
    targets = find_targets(model, list(names.values()), quantised=record.recipe.needs_residual)
    by_module = {target.module: target for target in targets}
    starts = read_starts(initial, {there: by_module[here] for there, here in names.items()}, record.recipe)
    kinds = {names[module]: kind for module, kind in record.recipe.targets.items()}
    record = dataclasses.replace(
        record,
        kind="state",
        recipe=dataclasses.replace(
            record.recipe,
            base_form="residual",
            targets=kinds,
            ranks={names[module]: rank for module, rank in record.recipe.ranks.items()},
        ),
        notes={**record.notes, "residual": str(folder.resolve())},
    )
    return wrap(model, Attachment(record, targets), starts, heads, adapter, on_residual=True)


def _names_here(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """The model's own name of each module, which a head puts under a prefix (`bert.encoder`) that its base lacks."""
    known, prefix = plain_modules(model), f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for module in modules:
        here = next((n for n in (module, prefix + module, module.removeprefix(prefix)) if n in known), None)
        if here is None:
            raise CheckpointError(f"this model has no `{module}`, which the start is for: load the folder's own model")
        found[module] = here
    return found


def check_base(record: Record, model: nn.Module, what: str) -> bool:
    """Compare a model in memory with the base that a record names, or with the residual it wrote.

    Returns:
        Whether the model is that residual.

    Raises:
        WrongBaseError: naming the first differing tensor, both digests and what to do.
    """
    assert record.recipe is not None and record.base is not None
    model = plain_model(model)
    # A folder that others made carries no note and leaves only the residual to compare with.
    on_residual = bool(record.residual) and (is_residual(model) or not record.base.tensors)
    if record.recipe.needs_residual and not on_residual:
        raise WrongBaseError(
            f"{what} belongs on the residual in {record.recipe.quant} that it was made with, and this model is none: "
            f"load {record.notes.get('residual', 'the folder above pissa_init/')}"
        )
    revision = f", revision {record.base.revision}" if record.base.revision else ""
    check_same(
        {**record.base.tensors, **record.residual} if on_residual else record.base.tensors,
        model_tensors(model).get,
        what=what,
        advice=f"Use the base it was made on: {record.base.name}{revision}",
    )
    return on_residual


def _foreign_record(config: dict, model: nn.Module, folder: Path) -> Record:
    """Folders that others made: residual at the root, the start in pissa_init/, nothing about the base."""
    if config.get("init_lora_weights") is not True:
        raise WrongBaseError(
            f"{folder / INIT / plain.CONFIG} has init_lora_weights {config.get('init_lora_weights')!r}, expected true: "
            "stock tools would decompose the residual again"
        )
    warnings.warn(
        f"{folder} has no pissa.json: which original base it was made from is unknown until you name it with --base, "
        "and it cannot be checked",
        stacklevel=3,
    )
    targets = find_targets(model, config["target_modules"])
    recipe = Recipe(
        method="pissa",
        rank=config["r"],
        alpha=config["lora_alpha"],
        svd="unknown",
        seed=0,
        base_form="residual",
        targets={target.module: target.kind for target in targets},
    )
    weights = model_tensors(model)
    return Record("init", recipe, Base("unknown"), residual=fingerprint(weights))
