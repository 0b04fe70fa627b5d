"""Settings from a YAML file and flags: spellings of other tools, and all mistakes in one report."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pissa.config.settings import KEYS, TrainSettings
from pissa.errors import ConfigError, did_you_mean

ALIASES = {
    "base_model": "model", "model_name_or_path": "model",
    "adapter": "method", "finetuning_type": "method",
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "lora_target_modules": "targets", "lora_target": "targets",
    "dataset": "data", "dataset_path": "data", "train_file": "data", "val_set_size": "eval_size",
    "output_dir": "output", "lr": "learning_rate", "lr_scheduler_type": "lr_scheduler",
    "per_device_train_batch_size": "micro_batch_size", "num_epochs": "epochs", "num_train_epochs": "epochs",
    "bnb_4bit_quant_type": "quant", "bnb_4bit_use_double_quant": "double_quant",
    "sequence_len": "max_length", "max_seq_length": "max_length", "cutoff_len": "max_length", "torch_dtype": "dtype",
}  # fmt: skip
"""Spellings of axolotl, LLaMA-Factory, TRL and peft; `gradient_accumulation_steps` is understood too."""


def load_settings(path: Path | None, overrides: Mapping[str, object]) -> TrainSettings:
    """Read a YAML file, let `overrides` (the flags) win, check everything.

    Args:
        path: the YAML file, or None for flags alone.
        overrides: key to value; both may use the aliases of other tools.

    Raises:
        ConfigError: one line per mistake, all of them.
    """
    mistakes: list[str] = []
    values = _canonical(_read_yaml(path, mistakes), mistakes) if path else {}
    values |= _canonical(overrides, mistakes)
    _set_batch_size(values, mistakes)
    _set_quant(values, mistakes)
    try:
        settings = TrainSettings.model_validate(values)
    except ValidationError as error:
        mistakes += _lines(error)
    if mistakes:
        raise config_error(mistakes, str(path) if path else "the settings")
    return settings


def config_error(mistakes: list[str], where: str) -> ConfigError:
    """One error for all mistakes."""
    count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
    return ConfigError(f"{count} in {where}:\n" + "\n".join(f"  {line}" for line in mistakes))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that notes repeated keys, which it would let win silently."""

    repeated: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [(self.construct_object(key, deep=True), key.start_mark.line + 1) for key, _ in node.value]
        first: dict[Any, int] = {}
        for key, line in keys:
            if key in first:
                self.repeated.append(f"{key}: got it in line {first[key]} and again in line {line}, expected it once")
            first.setdefault(key, line)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, mistakes: list[str]) -> dict[str, Any]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.repeated = mistakes
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, expected lines like `model: folder`")
    return {str(key): value for key, value in content.items()}


def _canonical(values: Mapping[str, Any], mistakes: list[str]) -> dict[str, Any]:
    """Our spelling of every key; two spellings of one key are a mistake."""
    spelled: dict[str, str] = {}
    for key in values:
        name = ALIASES.get(key, key)
        if name in spelled:
            mistakes.append(f"{key}: got it beside {spelled[name]}, expected one of the two")
        spelled.setdefault(name, key)
    return {name: values[key] for name, key in spelled.items()}


def _set_batch_size(values: dict[str, Any], mistakes: list[str]) -> None:
    """Turn `gradient_accumulation_steps` into batch_size = micro_batch_size x steps."""
    steps = values.pop("gradient_accumulation_steps", None)
    if steps is None:
        return
    try:
        batch_size = int(steps) * int(values["micro_batch_size"])
    except (KeyError, TypeError, ValueError):
        mistakes.append(f"gradient_accumulation_steps: got {steps!r}, expected a number beside micro_batch_size")
        return
    if values.setdefault("batch_size", batch_size) != batch_size:
        mistakes.append(
            f"gradient_accumulation_steps: got {steps}, expected batch_size / micro_batch_size, "
            f"{values['batch_size']} / {values['micro_batch_size']}"
        )


def _set_quant(values: dict[str, Any], mistakes: list[str]) -> None:
    """`load_in_4bit: true` of other tools is nf4 unless fp4 stands beside it, `load_in_8bit: true` int8."""
    if values.get("quant") == "null":
        values["quant"] = None  # a flag takes a file's quantiser back
    for key, formats in (("load_in_4bit", ("nf4", "fp4")), ("load_in_8bit", ("int8",))):
        asked = str(values.pop(key, None)).lower()
        if asked not in ("true", "false", "none"):
            mistakes.append(f"{key}: got {asked!r}, expected true or false")
        elif asked == "true" and values.setdefault("quant", formats[0]) not in formats:
            mistakes.append(f"{key}: got it beside quant {values['quant']!r}, expected one of the two")


def _lines(error: ValidationError) -> list[str]:
    """`key: got ..., expected ...` for each mistake; the branches of a union in one line."""
    lines: dict[str, str] = {}
    for mistake in error.errors():
        key = str(mistake["loc"][0])
        if mistake["type"] == "default_factory_not_called":
            continue  # a default that follows from another key, which has a line of its own
        if mistake["type"] == "extra_forbidden":
            hint = did_you_mean(key, (*KEYS, *ALIASES))
            lines[key] = f"{key}: got an unknown key, expected one of those in `pissa train --list-keys`.{hint}"
            continue
        expected = re.sub(r"^(Input|String|List|Value)? ?(should (be|have)|error,) ", "", mistake["msg"])
        if key in lines:
            lines[key] += f", or {expected}"
        elif mistake["type"] == "missing":
            lines[key] = f"{key}: got nothing, expected {TrainSettings.model_fields[key].description}"
        else:
            got, names = mistake["input"], re.findall(r"'([^']*)'", mistake["msg"])
            hint = did_you_mean(got, names) if isinstance(got, str) and mistake["type"] == "literal_error" else ""
            lines[key] = f"{key}: got {got!r}, expected {expected}{hint}"
    return list(lines.values())
