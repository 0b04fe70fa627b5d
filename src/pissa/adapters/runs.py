"""A run between memory and disk: save, load, and restart from its start.

`run/adapter` is the plain LoRA to use anywhere, `run/state` what going on needs. Loading checks the
fingerprint of the base before it touches the model, so a run never meets another base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from pissa.adapters import plain, sharding
from pissa.adapters.attach import Attachment, adapter_layers, attachments_of, wrap
from pissa.adapters.initial import check_base, load_initial
from pissa.adapters.plain import INIT
from pissa.adapters.state import (
    RECORD,
    STATE,
    State,
    check_finished,
    read_state,
    write_adapter,
    write_state,
)
from pissa.checkpoint.output import read_json, staged_output
from pissa.checkpoint.targets import short_names
from pissa.errors import CheckpointError, InputError, OutputError
from pissa.method import brought
from pissa.records import Record
from pissa.splits import Factors
from pissa.untyped import Json


def save(model: PeftModel, run: str | Path, *, adapter_name: str | None = None) -> Path:
    """Write `run/adapter` (plain LoRA for the original base) and `run/state` (what going on needs).

    Args:
        model: made by `attach` or `load`.
        run: a new folder, or one that an earlier `save` or training made.
        adapter_name: which adapter; the only one by default.

    Returns:
        The run's folder.

    Raises:
        InputError: the model carries no such attachment.
        OutputError: the folder holds something else, or cannot be written.
    """
    return write(state_of(model, adapter_name=adapter_name), run)


def state_of(model: PeftModel, *, adapter_name: str | None = None) -> State:
    """What `save` writes, whole; where FSDP2 spread the model, all processes call this together.

    Raises:
        InputError: the model carries no such attachment.
    """
    name, attachment = _attachment(model, adapter_name)
    _refuse_other_optimizer(model, name, attachment)
    form, started, trained = attachment.adaptation.form, {}, {}
    for module, layer in adapter_layers(model, attachment.targets).items():
        own = form.trained(layer, name).named()
        trained[module] = Factors(
            **{part: sharding.whole(tensor).detach().clone() for part, tensor in own.items()}
        )
        started[module] = form.start(layer, name, trained[module])
    # Without "False" peft adds the whole weight of an embedding that is a target.
    saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    extras = {key: sharding.whole(value) for key, value in saved.items() if ".lora_" not in key}
    peft_config: Any = model.peft_config[name]
    heads = peft_config.modules_to_save
    record = dataclasses.replace(
        attachment.record,
        notes={
            **attachment.record.notes,
            "modules_to_save": sorted(set(heads)) if heads else [],
            "task_type": peft_config.task_type,
            "target_modules": short_names(attachment.targets, model.get_base_model()),
            "shapes": {target.module: list(target.shape) for target in attachment.targets},
            "model_config": _model_config(model.get_base_model()) if extras else None,
        },
    )
    shapes = record.notes["shapes"]
    return State(record, attachment.adaptation, started, trained, extras, shapes)


def write(state: State, run: str | Path) -> Path:
    """Write a state's `run/adapter` and `run/state`; see `save`."""
    run = Path(run)
    if run.is_file() or (run.is_dir() and any(run.iterdir()) and not _looks_like_run(run)):
        raise OutputError(f"{run} is not empty and is not a run: choose a new folder")
    run.mkdir(parents=True, exist_ok=True)
    with staged_output(run / "adapter", force=True) as folder:
        write_adapter(folder, state)
    with staged_output(run / "state", force=True) as folder:
        write_state(folder, state)
    return run


def load(
    model: nn.Module,
    path: str | Path,
    *,
    trainable: bool = True,
    adapter_name: str = "default",
    modules_to_save: Iterable[str] | None = None,
) -> PeftModel:
    """Put a saved run, a decomposed folder's start, or a plain LoRA made here on its base, after
    checking the base.

    Args:
        model: the base model, as it was when the run began (for a decomposed folder: the residual
            model).
        path: a run, its state/ or adapter/ folder, a converted LoRA, or a decomposed folder.
        trainable: whether to go on training.
        adapter_name: peft's name for the adapter.
        modules_to_save: modules that train whole beside a decomposed folder's start; by default a
            new head.

    Raises:
        WrongBaseError: naming the first differing tensor, both digests and what to do.
        CheckpointError: not a folder that pissa wrote.
    """
    path = Path(path)
    check_finished(path)
    if (path / "state" / RECORD).is_file():
        wrapped = _load_state(model, path / "state", adapter_name, from_start=False)
    elif (path / STATE).is_file():
        wrapped = _load_state(model, path, adapter_name, from_start=False)
    elif (path / INIT).is_dir():
        wrapped = load_initial(model, path, adapter_name, modules_to_save)
    elif (path / plain.WEIGHTS).is_file():
        wrapped = _load_plain(model, path, adapter_name, trainable)
    else:
        raise CheckpointError(
            f"{path} is neither a run, nor a decomposed folder, nor a LoRA adapter: see pissa inspect"
        )
    if not trainable:
        wrapped.requires_grad_(False)
        wrapped.eval()
    return wrapped


def restart(model: nn.Module, state: str | Path, *, adapter_name: str = "default") -> PeftModel:
    """The same start that a run began with, drift zero, on a checked base: what resuming a training needs."""
    return _load_state(model, Path(state), adapter_name, from_start=True)


def _load_state(model: nn.Module, folder: Path, adapter: str, *, from_start: bool) -> PeftModel:
    state = read_state(folder)
    split = check_base(state.record, model, f"the state in {folder}")
    attachment = Attachment(state.adaptation, state.record, state.targets, split)
    heads, form = state.record.notes["modules_to_save"], state.adaptation.form
    wrapped = wrap(model, attachment, state.starts, heads, adapter)
    put = form.begin_again if from_start else form.assign
    for module, layer in adapter_layers(wrapped, state.targets).items():
        put(layer, adapter, state.trained[module])
    if state.extras:
        set_peft_model_state_dict(wrapped, state.extras, adapter_name=adapter)
    if state.adaptation.method.optimizer:
        note_optimizer(wrapped, brought(state.adaptation.method.optimizer))
    return wrapped


def note_optimizer(model: nn.Module, optimizer: Callable[..., Any]) -> None:
    """Write down on a model that this optimizer, which a method may bring, trains it.

    `pissa train` does; an optimizer that is to be made by hand too, as `LoraPro`, does it itself.

    Args:
        model: that is trained.
        optimizer: the class or function that made it.
    """
    noted: set[str] = getattr(model, "pissa_optimizers", set())
    model.pissa_optimizers = noted | {_name_of(optimizer)}  # type: ignore[assignment]


def _name_of(optimizer: Callable[..., Any]) -> str:
    """As it is imported: pissa.training.lora_pro.LoraPro."""
    return f"{optimizer.__module__}.{optimizer.__qualname__}"


def _refuse_other_optimizer(model: PeftModel, adapter: str, attachment: Attachment) -> None:
    """A method that brings an optimizer must have been trained by it; a start is as good as any."""
    method, form = attachment.adaptation.method, attachment.adaptation.form
    if not method.optimizer:
        return
    own = _name_of(brought(method.optimizer))
    if own in getattr(model, "pissa_optimizers", ()):
        return
    for layer in adapter_layers(model, attachment.targets).values():
        trained = form.trained(layer, adapter)
        drift = form.drift(form.start(layer, adapter, trained), trained)
        if any(part.any() for part in drift.named().values()):
            raise InputError(
                f"adapter {adapter!r} was attached as {method.name} and trained by another "
                f"optimizer: train it with {own}(model), or attach it as another method"
            )


def _load_plain(model: nn.Module, folder: Path, adapter: str, trainable: bool) -> PeftModel:
    if not (folder / RECORD).is_file():
        raise CheckpointError(
            f"{folder} has no pissa.json, so the base it needs cannot be checked: load it with peft at your own risk, "
            "or look at it with pissa inspect"
        )
    record = Record.from_json(read_json(folder / RECORD), str(folder / RECORD))
    if record.kind != "lora":
        raise CheckpointError(
            f"{folder} is a {record.kind!r} folder, not a plain LoRA: load the folder above it"
        )
    check_base(record, model, f"the adapter in {folder}")
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter, is_trainable=trainable)
        return model
    return PeftModel.from_pretrained(
        model, str(folder), adapter_name=adapter, is_trainable=trainable
    )


def _model_config(model: nn.Module) -> Json:
    """The config with the class that is really there: a new head is no part of the base's own config."""
    return {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}  # type: ignore[operator, union-attr]


def _attachment(model: PeftModel, adapter_name: str | None) -> tuple[str, Attachment]:
    attachments = attachments_of(model)
    present = [name for name in attachments if name in model.peft_config]
    if adapter_name is None and len(present) == 1:
        adapter_name = present[0]
    if adapter_name not in present:
        raise InputError(
            f"adapter {adapter_name!r} was not attached by pissa; attached here: {', '.join(present) or 'none'}. "
            "Name one with adapter_name, or use the model's own save_pretrained"
        )
    return adapter_name, attachments[adapter_name]


def _looks_like_run(run: Path) -> bool:
    return any(
        (run / name).exists()
        for name in ("state", "adapter", "run.json", "metrics.jsonl", "settings.yaml")
    )
