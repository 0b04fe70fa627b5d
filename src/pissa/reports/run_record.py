"""What a run's own record says of it: settings apart from their defaults, and the base it began from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pissa.checkpoint.output import read_json
from pissa.config import TrainSettings
from pissa.errors import CheckpointError
from pissa.untyped import Json

PLACES = ("model", "data", "output", "method", "rank")
"""Settings that are told even where they are the default."""


def read_run(run: Path) -> Json:
    """The content of a run's run.json.

    Raises:
        CheckpointError: no run, one that never began, or a damaged one.
    """
    if not (run / "run.json").is_file():
        raise CheckpointError(
            f"{run} holds no run.json: give the folder that `pissa train` wrote (its `output`)"
        )
    record = read_json(run / "run.json")
    missing = {"status", "settings", "data", "base", "versions"} - record.keys()
    if missing:
        raise CheckpointError(
            f"{run / 'run.json'} lacks {', '.join(sorted(missing))}: the run never came to its first step; train it"
        )
    return record


def set_by_hand(settings: Json) -> Json:
    """The settings that differ from their defaults, and those that say what the run is about."""
    usual = defaults(settings)
    return {key: value for key, value in settings.items() if key not in usual}


def defaults(settings: Json) -> Json:
    """The settings that are as they are by default."""

    def is_default(key: str, value: Any) -> bool:
        field = TrainSettings.model_fields.get(key)
        if field is None or field.is_required() or key in PLACES:
            return False
        return bool(field.get_default(call_default_factory=True, validated_data=settings) == value)

    return {key: value for key, value in settings.items() if is_default(key, value)}


def base_facts(run: Path, record: Json) -> Json:
    """What is known of the model that the run began from."""
    known = {key: record["base"].get(key) for key in ("name", "revision", "dtype")}
    file = run / "state" / "pissa.json"
    state = read_json(file) if file.is_file() else {}
    base, recipe = state.get("base") or {}, state.get("recipe") or {}
    told = {
        "original": base.get("name") if base.get("name") != known["name"] else None,
        "fingerprint (SHA-256)": base.get("fingerprint"),
        "frozen part in few bits": recipe.get("quant"),
    }
    return {key: value for key, value in {**known, **told}.items() if value}
