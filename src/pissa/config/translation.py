"""From other tools' keys to ours: first key by key, then what several keys say together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from pissa.config.spellings import (
    ACCUMULATION,
    ALIASES,
    EVERY_STEPS,
    IGNORED,
    INIT,
    MEANINGS,
    PER_DEVICE,
    RENAMED,
    VALUES,
)

Mistakes = list[str]
TYPES = {
    "": {},
    "alpaca": {"template": "alpaca"},
    "chat_template": {"template": "chat"},
    "completion": {},
}
"""Types of axolotl's data sets that have a meaning here."""
ENTRY = ("path", "name", "split", "type", "data_files", "ds_type", "field", "field_messages")


def translate(values: Mapping[str, Any], mistakes: Mistakes) -> tuple[dict[str, Any], list[str]]:
    """Our spelling of every key of one file, or of the flags; two ways to say different things are
    a mistake.

    Args:
        values: keys as they were written.
        mistakes: where a line for each mistake is added.

    Returns:
        The settings, and the keys that were left out since they have no bearing here.
    """
    found: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for key, value in values.items():
        if key in IGNORED:
            continue
        for name, ours in _meaning(key, value, mistakes).items():
            if name in spelled and found[name] != ours:
                mistakes.append(f"{key}: got it beside {spelled[name]}, expected one of the two")
                continue
            spelled.setdefault(name, key)
            found[name] = ours
    return found, [key for key in values if key in IGNORED]


def combine(values: dict[str, Any], mistakes: Mistakes) -> None:
    """Resolve what only several keys together say, in place."""
    _set_batch_size(values, mistakes)
    _set_quant(values, mistakes)
    _set_start(values, mistakes)
    if values.pop(EVERY_STEPS, False) and not values.get("eval_steps"):
        mistakes.append(
            "eval_strategy: got steps, expected eval_steps beside it: a number of optimiser steps"
        )


def _meaning(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """What one key says in our words."""
    if key in MEANINGS:
        known, advice = MEANINGS[key]
        if _word(value) in known:
            return known[_word(value)]
        mistakes.append(f"{key}: got {value!r}, expected {advice}")
        return {}
    if key in READERS:
        return READERS[key](key, value, mistakes)
    name = RENAMED.get(key) or ALIASES.get(key, key)
    return {name: VALUES.get(name, {}).get(_word(value), value)}


def _word(value: Any) -> str:
    return str(value).strip().lower()


def _names(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """A list of modules, also with commas."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return {"modules_to_save": None if names == ["null"] else names}


def _mapping(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """A flag holds a mapping as text: {instruction: Question}."""
    try:
        return {key: yaml.safe_load(value) if isinstance(value, str) else value}
    except yaml.YAMLError:
        return {key: value}


def _warmup(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """Transformers takes a share of the steps below 1, and a number of steps from 1."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 1
    if share < 1:
        return {"warmup_ratio": value}
    mistakes.append(
        f"{key}: got {value!r}, expected warmup_ratio: a share of all steps, as in 0.03"
    )
    return {}


def _per_device(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """Elsewhere it decides the rows per step, together with the accumulation; here batch_size does."""
    return {"micro_batch_size": value, PER_DEVICE: value}


def _svd(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """LLaMA-Factory's number of rounds of the sketch; -1 is the whole SVD. Ours needs no number."""
    return {"svd": "exact" if _word(value) == "-1" else "fast"}


def _bf16(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """`auto` is true on a GPU that computes in bfloat16."""
    if _word(value) != "auto":
        return {"bf16": value}
    import torch

    return {"bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported()}


def _data_set(key: str, value: Any, mistakes: Mistakes) -> dict[str, Any]:
    """Axolotl's list of data sets, if it has one entry."""
    data, split = ("data", "data_split") if key == "datasets" else ("eval_data", "eval_split")
    if isinstance(value, str):
        return {data: value}
    entry = value[0] if isinstance(value, list) and len(value) == 1 else None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        count = f"{len(value)} entries" if isinstance(value, list) else repr(value)
        mistakes.append(
            f"{key}: got {count}, expected one entry [{{path: ...}}], or {data}: PATH with all rows in it"
        )
        return {}
    unknown = [name for name in entry if name not in ENTRY]
    kind = "" if entry.get("type") is None else entry["type"]
    if unknown or not isinstance(kind, str) or kind not in TYPES:
        got = unknown[0] if unknown else f"type {kind!r}"
        mistakes.append(
            f"{key}: got {got}, expected {data}: PATH with template: (alpaca, chat, plain, none) "
            "and fields: {instruction: your_column}"
        )
        return {}
    path = entry["path"]
    if isinstance(entry.get("data_files"), str):
        path = (
            entry["data_files"]
            if path in ("json", "csv", "parquet")
            else f"{path}/{entry['data_files']}"
        )
    columns = {
        ours: entry[name]
        for name, ours in (("field", "text"), ("field_messages", "messages"))
        if name in entry
    }
    found = {data: f"{path}:{entry['name']}" if entry.get("name") else path, **TYPES[kind]}
    found |= {split: entry["split"]} if entry.get("split") else {}
    return found | ({"fields": columns} if columns else {})


READERS: dict[str, Callable[[str, Any, Mistakes], dict[str, Any]]] = {
    "additional_target": _names,
    "bf16": _bf16,
    "datasets": _data_set,
    "fields": _mapping,
    "lora_modules_to_save": _names,
    "modules_to_save": _names,
    "options": _mapping,
    PER_DEVICE: _per_device,
    "pissa_iter": _svd,
    "test_datasets": _data_set,
    "warmup_steps": _warmup,
}
"""Keys whose values need more than a table."""


def _set_batch_size(values: dict[str, Any], mistakes: Mistakes) -> None:
    """Turn `gradient_accumulation_steps` into batch_size = micro_batch_size x steps."""
    per_device, steps = values.pop(PER_DEVICE, None), values.pop(ACCUMULATION, None)
    if steps is None:
        if per_device is not None and "batch_size" not in values:
            mistakes.append(
                f"{PER_DEVICE}: got it alone, expected batch_size, the rows per optimiser step, or {ACCUMULATION} "
                "beside it"
            )
        return
    try:
        batch_size = int(steps) * int(values["micro_batch_size"])
    except (KeyError, TypeError, ValueError):
        mistakes.append(
            f"{ACCUMULATION}: got {steps!r}, expected a number beside micro_batch_size, the rows per forward pass"
        )
        return
    if str(values.setdefault("batch_size", batch_size)) != str(batch_size):
        mistakes.append(
            f"{ACCUMULATION}: got {steps}, expected batch_size / micro_batch_size, "
            f"{values['batch_size']} / {values['micro_batch_size']}"
        )


def _set_quant(values: dict[str, Any], mistakes: Mistakes) -> None:
    """`load_in_4bit: true` of other tools is nf4 unless fp4 stands beside it, `load_in_8bit: true` int8."""
    for key, formats in (("load_in_4bit", ("nf4", "fp4")), ("load_in_8bit", ("int8",))):
        asked = _word(values.pop(key, None))
        if asked not in ("true", "false", "none"):
            mistakes.append(f"{key}: got {asked!r}, expected true or false")
        elif asked == "true" and values.setdefault("quant", formats[0]) not in formats:
            mistakes.append(
                f"{key}: got it beside quant {values['quant']!r}, expected one of the two"
            )


def _set_start(values: dict[str, Any], mistakes: Mistakes) -> None:
    """Peft's `init_lora_weights` names the method, where other tools' method is lora or qlora."""
    if INIT not in values:
        return
    word, method = _word(values.pop(INIT)), values.get("method", "lora")
    start = (
        "lora" if word in ("true", "none", "null") else re.sub(r"^pissa_niter_\d+$", "pissa", word)
    )
    if start not in ("lora", "pissa", "milora", "olora", "loftq"):
        mistakes.append(
            f"{INIT}: got {word!r}, expected method: one of those listed by `pissa methods`"
        )
    elif method in (start, f"q{start}") or (start == "lora" and method == "qlora"):
        values["method"] = method
    elif method not in ("lora", "qlora"):
        mistakes.append(f"{INIT}: got {word!r} beside method {method!r}, expected one of the two")
    else:
        values["method"] = start
        if method == "qlora":
            values.setdefault("quant", "nf4")
