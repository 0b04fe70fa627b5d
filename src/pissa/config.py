"""The settings of a training run, from YAML and flags; every mistake is in one report.

Defaults are those of the PiSSA authors' scripts (github.com/MuLabPKU/PiSSA), except rank: learning rate 2e-5, cosine,
warm-up 3 %, no weight decay, 128 rows per step, one epoch, 512 tokens, loss on the response only.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

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

Column = Literal[
    "messages", "prompt", "completion", "instruction", "input", "output", "question", "answer", "text", "text_pair",
    "sentence", "sentence1", "sentence2", "label",
]  # fmt: skip


def _no_bool(value: Any) -> Any:
    # YAML reads yes and on as true, which pydantic would take for 1.
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]


class TrainSettings(BaseModel):
    """What a run does. Paths are relative to the working directory, also those in a YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, description="Base model: a folder with safetensors, or a Hub id.")
    revision: str | None = Field(None, description="Commit, tag or branch of a Hub model; null for its main branch.")
    method: str = Field(
        "pissa", description="full (every weight trains), a name listed by `pissa methods`, or qlora, loftq, qpissa."
    )
    rank: Whole = Field(16, ge=1, description="Rank of the adapter, 1 to the smaller side of a weight; unused by full.")
    alpha: Number = Field(
        default_factory=lambda data: float(data.get("rank", 16)),
        gt=0,
        description="Strength: the adapter's product is scaled by alpha / rank. Default: the rank, for a scale of 1.",
    )
    dropout: Number = Field(0.0, ge=0, lt=1, description="Share of adapter inputs set to zero; 0 is off; lora only.")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, module names, or a regular expression over full module names."
    )
    modules_to_save: list[str] | None = Field(
        None, description="Further modules that train in full and are saved; null for none. A new head is added itself."
    )
    base: Literal["keep", "residual"] = Field(
        "keep", description="keep: the base stays as it is and the change trains. residual: the paper's form."
    )
    svd: Literal["fast", "exact"] | Number = Field(
        "fast", description="fast: seeded sketch. exact: certified to 1e-5. A number: the tolerance to certify."
    )
    quant: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="nf4, fp4 or int8 for the frozen part of a 16-bit base; null: as it is, or as a preset says."
    )
    iterations: Whole | None = Field(
        None, ge=1, description="Rounds of low-rank part and quantised rest (pissa, loftq). Default: 5."
    )
    double_quant: bool = Field(False, description="Quantise the scales of the blocks too (nf4, fp4).")
    task: Literal["language", "classification"] = Field("language", description="What the model learns to do.")
    data: str = Field(
        min_length=1, description="Training data: json, jsonl, csv, tsv, parquet, folder, or a Hub id[:subset]."
    )
    data_split: str = Field("train", description="Split to train on, of a folder (train.*) or a Hub data set.")
    eval_data: str | None = Field(None, description="Evaluation data, as `data`; null for none.")
    eval_split: str = Field("validation", description="Split to evaluate on, of a folder or a Hub data set.")
    eval_size: Number = Field(0, ge=0, description="Rows held out of `data` to evaluate on: below 1 a share; 0 is off.")
    data_limit: Whole = Field(0, ge=0, description="Use the first so many rows of `data`; 0 for all.")
    fields: dict[Column, str] = Field(
        default_factory=dict, description="Known column name to the name in your file, as in {label: Quality}."
    )
    template: Literal["auto", "alpaca", "chat", "plain", "none"] = Field(
        "auto",
        description="Prompt around instructions and messages: alpaca (the paper's), chat (the tokenizer's own), plain "
        "(User: and Assistant: lines), none (the words alone). auto: alpaca for instructions, chat for messages.",
    )
    output: str = Field(min_length=1, description="Folder of the run; absent, empty, or see `force` and --resume.")
    learning_rate: Number = Field(2e-5, gt=0, description="Peak step size of AdamW.")
    batch_size: Whole = Field(128, ge=1, description="Rows per optimiser step.")
    micro_batch_size: Whole = Field(
        default_factory=lambda data: _largest_divisor(data.get("batch_size", 1)),
        ge=1,
        description="Rows per forward pass, a divisor of batch_size. Default: the largest one up to 8.",
    )
    max_steps: Whole = Field(0, ge=0, description="Optimiser steps; 0: `epochs` decides.")
    epochs: Number = Field(1.0, gt=0, description="Passes over the data; unused when max_steps is set.")
    max_length: Whole = Field(512, ge=2, description="Tokens per row; longer rows lose their end.")
    warmup_ratio: Number = Field(
        0.03, ge=0, lt=1, description="Share of the steps over which the rate rises; 0 is off."
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the rate after warm-up."
    )
    weight_decay: Number = Field(0.0, ge=0, description="AdamW's decay per step and unit of rate; 0 is off.")
    max_grad_norm: Number = Field(1.0, ge=0, description="Longer gradients are shortened to this norm; 0 is off.")
    seed: Whole = Field(
        0, ge=0, lt=2**32, description="Fixes the start, a new head, dropout and the order of the data."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the base model; auto: as stored. Adapters train in float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the accelerator if there is one.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about 20 % slower.")
    eval_steps: Whole = Field(0, ge=0, description="Evaluate every so many steps; 0: at the end only.")
    save_steps: Whole = Field(100, ge=0, description="Checkpoint every so many steps; 0: at the end only.")
    save_total_limit: Whole = Field(2, ge=0, description="Checkpoints to keep, the newest; 0 for all.")
    logging_steps: Whole = Field(1, ge=1, description="A line in metrics.jsonl every so many steps.")
    report_to: str | list[str] = Field(
        "none", description="tensorboard, wandb, ... (transformers' names); none is off."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Read it first.")
    force: bool = Field(False, description="Replace an earlier run in `output`; never other files.")

    @field_validator("targets", mode="before")
    @classmethod
    def _name_list(cls, value: Any) -> Any:
        """`q_proj,v_proj` is a list, as in LLaMA-Factory; `all` is all-linear."""
        if isinstance(value, str) and re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value.strip()):
            return [name.strip() for name in value.split(",")]
        return "all-linear" if value == "all" else value

    @field_validator("micro_batch_size")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch_size")
        if batch is not None and batch % value:
            raise ValueError(f"a divisor of batch_size, which is {batch}")
        return value

    @field_validator("eval_size")
    @classmethod
    def _one_evaluation(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("eval_data"):
            raise ValueError("0 beside eval_data: one of the two")
        if value >= 1 and value != int(value):
            raise ValueError("a share below 1 or a whole number of rows")
        return value

    @field_validator("eval_steps")
    @classmethod
    def _has_evaluation(cls, value: int, info: ValidationInfo) -> int:
        if value and "eval_size" in info.data and not (info.data["eval_size"] or info.data.get("eval_data")):
            raise ValueError("eval_data or eval_size beside it, to have something to evaluate on")
        return value


KEYS = tuple(TrainSettings.model_fields)


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


def _largest_divisor(batch_size: int) -> int:
    return max(size for size in range(1, 9) if batch_size % size == 0)
