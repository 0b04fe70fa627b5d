"""The model that a folder stands for, on the base it belongs to: what chat talks to and what is evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pissa.adapters import plain, runs
from pissa.checkpoint.output import read_json
from pissa.checks import chosen_device
from pissa.config import TrainSettings
from pissa.errors import CheckpointError, InputError
from pissa.records import Record
from pissa.surgery.folders import RESIDUAL, kind_of_folder
from pissa.training.models import load_base, load_tokenizer
from pissa.untyped import Json, Tokenizer

HUB = "hub"
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""Of a model: NAME or OWNER/NAME."""


@dataclass(frozen=True)
class Opened:
    """A causal language model ready to run.

    Attributes:
        model: on its device, in evaluation mode; with an adapter a `PeftModel`.
        tokenizer: of the training where there was one.
        kind: of the folder, as `pissa inspect` names it, or hub.
        base: the model that was loaded, by path or Hub id: the thing itself where there is no
            adapter.
        revision: of the base.
        adapter: the folder that was put on the base, or None.
        record: run.json of a run, or empty.
    """

    model: Any
    tokenizer: Tokenizer
    kind: str
    base: str
    revision: str | None
    adapter: Path | None
    record: Json


def open_model(
    path: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Load what a folder stands for, after checking that run and base belong together.

    Args:
        path: a finished run, a plain LoRA or a decomposed folder made here, a merged model, any
            model folder, or the Hub id of a whole model.
        base: where the base lies, if not where the record says.
        revision: of a Hub model: commit, tag or branch.
        device: where it runs. Default: cuda where there is one.
        dtype: float32, bfloat16 or float16 of the base. Default: as it was trained on, or as
            stored.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        InputError: a classifier.
        CheckpointError: no language model, or not finished.
        WrongBaseError: another base.
    """
    record, path, name, own_revision, adapter = find_model(Path(path), base)
    revision = revision or own_revision
    dtype = dtype or record.get("settings", {}).get("dtype", "auto")
    loaded = {
        "model": name,
        "revision": revision,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
    }
    settings = TrainSettings.model_validate({**loaded, "data": "none", "output": "none"})
    model, missing = load_base(settings, "AutoModelForCausalLM")
    if missing:
        raise InputError(
            f"{name} has no weights for {missing[0]}: it is no causal language model and cannot answer"
        )
    if not _in_few_bits(model):
        model = model.to(chosen_device(device))
    own = next(
        (
            place
            for place in (path / "adapter", path)
            if (place / "tokenizer_config.json").is_file()
        ),
        None,
    )
    tokenizer = load_tokenizer(
        settings.model_copy(update={"model": str(own), "revision": None}) if own else settings
    )
    on = runs.load(model, adapter, trainable=False) if adapter else model.eval()
    return Opened(on, tokenizer, _kind(path), name, revision, adapter, record)


def find_model(path: Path, base: str | None) -> tuple[Json, Path, str, str | None, Path | None]:
    """What `open_model` would load, refused where it cannot be.

    Returns:
        run.json of a run (else empty), the folder in question (of a full fine-tune its model/),
        name and revision of the model to load, and what to put on it.

    Raises:
        InputError, CheckpointError: as `open_model`.
    """
    record = _run_record(path)
    if record.get("settings", {}).get("method") == "full":
        path = path / "model"
    return record, path, *_model_of(path, base)


def _kind(path: Path) -> str:
    """As `kind_of_folder`; what is no path and may be a Hub id is one."""
    return HUB if HUB_ID.fullmatch(str(path)) and not path.exists() else kind_of_folder(path)


def _run_record(path: Path) -> Json:
    """The run.json of a finished run that can talk; nothing for other folders."""
    if not (path / "run.json").is_file():
        return {}
    record = read_json(path / "run.json")
    if record.get("status") != "finished":
        raise CheckpointError(
            f"{path} is not finished: go on with pissa train {path}/settings.yaml --resume"
        )
    if (task := record.get("settings", {}).get("task", "language")) != "language":
        raise InputError(
            f"{path} learnt {task}: it gives a class or a score and no text, so there is "
            "nothing to talk to or to ask. Load its adapter/ with peft, see adapter/README.md"
        )
    return record


def _model_of(path: Path, base: str | None) -> tuple[str, str | None, Path | None]:
    """Name and revision of the model to load, and what to put on it."""
    kind = _kind(path)
    if kind in ("merged", "model", HUB):
        if base:
            raise InputError(
                f"--base is {base}, but {path} is a whole model and needs none: leave it out"
            )
        return str(path), None, None
    if kind == "decomposed":
        return base or str(path), None, path
    if kind == "w4a4":
        raise CheckpointError(
            f"{path} is a model in 4 bits that transformers does not load: pissa merge BASE {path} OUT"
        )
    if kind not in ("run", "state", "lora"):
        raise CheckpointError(
            f"{path} is a {kind} folder, whose base cannot be checked: see pissa inspect {path}, then pissa convert it"
        )
    file = path / "state" / plain.RECORD if kind == "run" else path / plain.RECORD
    record = Record.from_json(read_json(file), str(file))
    served_on = record.served_on or record.made_of(str(path))
    if base or not (path / RESIDUAL).is_dir():
        return base or served_on.name, None if base else served_on.revision, path
    return str(path / RESIDUAL), None, path  # beside a run that may have been moved


def _in_few_bits(model: Any) -> bool:
    return bool(
        getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    )
