"""The settings of a training run, each with its default, range and meaning.

Defaults are those of the PiSSA authors' scripts (github.com/MuLabPKU/PiSSA), except rank: learning
rate 2e-5, cosine, warm-up 3 %, no weight decay, 128 rows per step, one epoch, 512 tokens, loss on
the response only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

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

    model: str = Field(
        min_length=1, description="Base model: a folder with safetensors, or a Hub id."
    )
    revision: str | None = Field(
        None, description="Commit, tag or branch of a Hub model; null for its main branch."
    )
    method: str = Field(
        "pissa",
        description="full (every weight trains), a name listed by `pissa methods`, or qlora, loftq, qpissa.",
    )
    rank: Whole = Field(
        16,
        ge=1,
        description="Rank of the adapter, 1 to the smaller side of a weight; unused by full.",
    )
    alpha: Number = Field(
        default_factory=lambda data: float(data.get("rank", 16)),
        gt=0,
        description="Strength: the adapter's product is scaled by alpha / rank. Default: the rank, for a scale of 1.",
    )
    dropout: Number = Field(
        0.0, ge=0, lt=1, description="Share of adapter inputs set to zero; 0 is off; lora only."
    )
    targets: str | list[str] = Field(
        "all-linear",
        description="all-linear, module names, or a regular expression over full module names.",
    )
    modules_to_save: list[str] | None = Field(
        None,
        description="Further modules that train in full and are saved; null for none. A new head is added itself.",
    )
    base: Literal["keep", "residual"] = Field(
        "keep",
        description="keep: the base stays as it is and the change trains. residual: the paper's form.",
    )
    svd: Literal["fast", "exact"] | Number = Field(
        "fast",
        description="fast: seeded sketch. exact: certified to 1e-5. A number: the tolerance to certify.",
    )
    quant: str | None = Field(
        None,
        description="nf4, fp4 or int8 for the frozen part of a 16-bit base; null: as it is, or as a preset says.",
    )
    iterations: Whole | None = Field(
        None,
        ge=1,
        description="Rounds of low-rank part and quantised rest (pissa, loftq). Default: 5.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The method's own settings, as {mode: kpm}; `pissa methods` lists them.",
    )
    calibration: str | None = Field(
        None,
        description="Rows to observe the base on, if the method needs it, or a file of pissa observe. null: `data`.",
    )
    calibration_rows: Whole = Field(
        64, ge=1, description="Use the first so many rows to observe the base on."
    )
    double_quant: bool = Field(
        False, description="Quantise the scales of the blocks too (nf4, fp4)."
    )
    task: Literal["language", "classification", "regression"] = Field(
        "language",
        description="What the model learns: to write, to name a class, or to give a score.",
    )
    data: str = Field(
        min_length=1,
        description="Training data: json, jsonl, csv, tsv, parquet, folder, or a Hub id[:subset].",
    )
    data_split: str = Field(
        "train", description="Split to train on, of a folder (train.*) or a Hub data set."
    )
    eval_data: str | None = Field(None, description="Evaluation data, as `data`; null for none.")
    eval_split: str = Field(
        "validation", description="Split to evaluate on, of a folder or a Hub data set."
    )
    old_data: str | None = Field(
        None,
        description="Data of what the model knew before, in columns of known names, to see forgetting. null: off.",
    )
    old_split: str = Field(
        "validation", description="Split of `old_data`, of a folder or a Hub data set."
    )
    eval_limit: Whole = Field(
        0, ge=0, description="Use the first so many rows of eval_data and of old_data; 0 for all."
    )
    eval_size: Number = Field(
        0, ge=0, description="Rows held out of `data` to evaluate on: below 1 a share; 0 is off."
    )
    data_limit: Whole = Field(
        0, ge=0, description="Use the first so many rows of `data`; 0 for all."
    )
    fields: dict[Column, str] = Field(
        default_factory=dict,
        description="Known column name to the name in your file, as in {label: Quality}.",
    )
    template: Literal["auto", "alpaca", "chat", "plain", "none"] = Field(
        "auto",
        description="Prompt around instructions and messages: alpaca (the paper's), chat (the tokenizer's own), plain "
        "(User: and Assistant: lines), none (the words alone). auto: alpaca for instructions, chat for messages.",
    )
    output: str = Field(
        min_length=1, description="Folder of the run; absent, empty, or see `force` and --resume."
    )
    learning_rate: Number = Field(2e-5, gt=0, description="Peak step size of AdamW.")
    batch_size: Whole = Field(128, ge=1, description="Rows per optimiser step.")
    micro_batch_size: Whole = Field(
        default_factory=lambda data: _largest_divisor(data.get("batch_size", 1)),
        ge=1,
        description="Rows per forward pass, a divisor of batch_size. Default: the largest one up to 8.",
    )
    max_steps: Whole = Field(0, ge=0, description="Optimiser steps; 0: `epochs` decides.")
    epochs: Number = Field(
        1.0, gt=0, description="Passes over the data; unused when max_steps is set."
    )
    max_length: Whole = Field(512, ge=2, description="Tokens per row; longer rows lose their end.")
    packing: bool = Field(
        False,
        description="Several rows in a sequence of max_length, where attention allows; batch_size counts these.",
    )
    warmup_ratio: Number = Field(
        0.03, ge=0, lt=1, description="Share of the steps over which the rate rises; 0 is off."
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the rate after warm-up."
    )
    weight_decay: Number = Field(
        0.0, ge=0, description="AdamW's decay per step and unit of rate; 0 is off."
    )
    max_grad_norm: Number = Field(
        1.0, ge=0, description="Longer gradients are shortened to this norm; 0 is off."
    )
    seed: Whole = Field(
        0,
        ge=0,
        lt=2**32,
        description="Fixes the start, a new head, dropout and the order of the data.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the base model; auto: as stored. Adapters train in float32."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the accelerator if there is one."
    )
    bf16: bool = Field(
        False,
        description="Compute in bfloat16 (autocast) while what trains stays in its own dtype.",
    )
    attn_implementation: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"
    ] = Field("auto", description="Kernel of attention; auto: sdpa where the model has it.")
    liger: bool = Field(
        False, description="Fused kernels of liger-kernel, a package of its own, on a GPU."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, about 20 % slower."
    )
    eval_steps: Whole = Field(
        0, ge=0, description="Evaluate every so many steps; 0: at the end only."
    )
    early_stopping: Whole = Field(
        0,
        ge=0,
        description="Stop after so many evaluations in a row without a lower eval_loss; 0 is off.",
    )
    save_steps: Whole = Field(
        100, ge=0, description="Checkpoint every so many steps; 0: at the end only."
    )
    save_total_limit: Whole = Field(
        2, ge=0, description="Checkpoints to keep, the newest; 0 for all."
    )
    logging_steps: Whole = Field(
        1, ge=1, description="A line in metrics.jsonl every so many steps."
    )
    report_to: str | list[str] = Field(
        "none", description="tensorboard, wandb, ... (transformers' names); none is off."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Read it first."
    )
    force: bool = Field(False, description="Replace an earlier run in `output`; never other files.")

    @field_validator("model", "data", "eval_data", "old_data", "calibration", "output")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        """`~/models` is a folder in the home of whoever runs this, in a file too."""
        return str(Path(value).expanduser()) if value and value.startswith("~") else value

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
        if (
            value
            and "eval_size" in info.data
            and not (info.data["eval_size"] or info.data.get("eval_data"))
        ):
            raise ValueError("eval_data or eval_size beside it, to have something to evaluate on")
        return value


def default_of(key: str) -> Any:
    """What a record that was written before there was such a key stands for; None where other keys decide."""
    field = TrainSettings.model_fields[key]
    return (
        field.get_default() if field.default_factory is None else {} if key == "options" else None
    )


KEYS = tuple(TrainSettings.model_fields)


def _largest_divisor(batch_size: int) -> int:
    return max(size for size in range(1, 9) if batch_size % size == 0)
