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
from pissa.adapters.adaptation import Adaptation
from pissa.adapters.attach import Attachment, is_residual, plain_model, wrap
from pissa.adapters.forms import Form
from pissa.adapters.plain import INIT
from pissa.checkpoint.fingerprint import check_same, fingerprint, model_tensors
from pissa.checkpoint.output import read_json
from pissa.checkpoint.targets import Target, find_targets, head_modules, plain_modules
from pissa.errors import CheckpointError, WrongBaseError
from pissa.method import Method
from pissa.records import Base, Recipe, Record
from pissa.splits import Factors
from pissa.untyped import Json


def read_pairs(folder: Path, targets: dict[str, Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """(left, right) of each target by its module from a stock adapter file, unscaled.

    Args:
        folder: of the adapter.
        targets: by the module's name in the file.

    Raises:
        CheckpointError: a target without its pair, naming the key.
    """
    found = {}
    with safe_open(folder / plain.WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name_there, target in targets.items():
            key_left, key_right = factors.file_keys(dataclasses.replace(target, module=name_there))
            missing = {key_left, key_right} - names
            if missing:
                raise CheckpointError(f"{folder / plain.WEIGHTS} lacks `{sorted(missing)[0]}`")
            left, right = file.get_tensor(key_left), file.get_tensor(key_right)
            found[target.module] = left.flatten(1), right.flatten(1)
    return found


def read_starts(folder: Path, targets: dict[str, Target], form: Form) -> dict[str, Factors]:
    """The start of each target by its module: the stock pair, or the parts that lie beside it.

    Args:
        folder: `pissa_init/`.
        targets: by the module's name in the files.
        form: of the start.

    Raises:
        CheckpointError: a part that is not there, naming the key.
    """
    if not form.beside_pair:
        return {module: Factors(*pair) for module, pair in read_pairs(folder, targets).items()}
    found = {}
    with safe_open(folder / plain.START, framework="pt") as file:
        names = set(file.keys())
        for name_there, target in targets.items():
            parts = [part for part in form.beside_pair if f"{name_there}.{part}" in names]
            if not {"left", "right"} <= set(parts):
                raise CheckpointError(
                    f"{folder / plain.START} lacks a factor of `{name_there}`: decompose again"
                )
            found[target.module] = Factors(
                **{part: file.get_tensor(f"{name_there}.{part}") for part in parts}
            )
    return found


def load_initial(
    model: nn.Module,
    folder: Path,
    adapter: str = "default",
    modules_to_save: Iterable[str] | None = None,
    method: Method | None = None,
) -> PeftModel:
    """Put the start of a decomposed folder on its residual model; see `pissa.load`.

    Args:
        model: the residual.
        folder: that it was loaded from.
        adapter: peft's name for it.
        modules_to_save: modules that train whole; by default a new head.
        method: one that is looked up already; taken if it is the one that the folder names.

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
    heads = head_modules(model) if modules_to_save is None else sorted(modules_to_save)
    recipe = record.split_by(initial)
    names = _names_here(model, recipe.targets)
    targets = find_targets(model, list(names.values()), quantised=recipe.quant is not None)
    by_module = {target.module: target for target in targets}
    recipe = dataclasses.replace(
        recipe,
        base_form="residual",
        targets={names[module]: kind for module, kind in recipe.targets.items()},
        ranks={names[module]: rank for module, rank in recipe.ranks.items()},
    )
    adaptation = Adaptation.of(recipe, method)
    by_name_there = {there: by_module[here] for there, here in names.items()}
    starts = read_starts(initial, by_name_there, adaptation.form)
    notes = {**record.notes, "residual": str(folder.resolve())}
    record = dataclasses.replace(record, kind="state", recipe=recipe, notes=notes)
    return wrap(model, Attachment(adaptation, record, targets, split=True), starts, heads, adapter)


def _names_here(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    """The model's own name of each module, which a head puts under a prefix (`bert.encoder`) that its base lacks."""
    known, prefix = plain_modules(model), f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for module in modules:
        here = next(
            (n for n in (module, prefix + module, module.removeprefix(prefix)) if n in known), None
        )
        if here is None:
            raise CheckpointError(
                f"this model has no `{module}`, which the start is for: load the folder's own model"
            )
        found[module] = here
    return found


def check_base(record: Record, model: nn.Module, what: str) -> bool:
    """Compare a model in memory with the base that a record names, or with the residual it wrote.

    Returns:
        Whether the model is that residual.

    Raises:
        WrongBaseError: naming the first differing tensor, both digests and what to do.
    """
    base, model = record.made_of(what), plain_model(model)
    # A folder that others made carries no note and leaves only the residual to compare with.
    split = bool(record.residual) and (is_residual(model) or not base.tensors)
    if record.beside and not split:
        raise WrongBaseError(
            f"{what} belongs on the residual in {record.beside} that it was made with, and this "
            f"model is none: load {record.notes.get('residual', 'the folder above pissa_init/')}"
        )
    revision = f", revision {base.revision}" if base.revision else ""
    check_same(
        {**base.tensors, **record.residual} if split else base.tensors,
        model_tensors(model).get,
        what=what,
        advice=f"Use the base it was made on: {base.name}{revision}",
    )
    return split


def _foreign_record(config: Json, model: nn.Module, folder: Path) -> Record:
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
