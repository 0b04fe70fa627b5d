"""Settings in transformers' words: the arguments that both trainers share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pissa.checks import chosen_device
from pissa.config import TrainSettings
from pissa.errors import ConfigError
from pissa.training.distributed import processes

_CHECKPOINTING = "activation_checkpointing"  # its name in newer versions of transformers
if _CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    _CHECKPOINTING = "gradient_checkpointing"
NEVER = 10**9  # steps; the trainers save and evaluate at the last step in any case


def common_arguments(settings: TrainSettings, folder: str, evaluate: bool) -> dict[str, Any]:
    """Keyword arguments for `TrainingArguments` and its subclasses.

    Args:
        settings: the run's.
        folder: where checkpoints go.
        evaluate: whether there is something to evaluate on.
    """
    schedule = (
        "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler
    )
    return {
        "output_dir": folder,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "max_steps": settings.max_steps or -1,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.micro_batch_size,
        "per_device_eval_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size
        // (settings.micro_batch_size * processes()),
        _CHECKPOINTING: settings.gradient_checkpointing,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "use_cpu": device(settings) == "cpu",
        "ddp_broadcast_buffers": False,  # start factors are the same everywhere, and as large as what trains
        "bf16": settings.bf16,  # else no autocast: the model's own dtype decides; adapters are float32 in any case
        "fp16": False,
        "eval_strategy": "steps" if evaluate else "no",
        "eval_steps": settings.eval_steps or NEVER,
        "save_strategy": "steps",
        "save_steps": settings.save_steps or NEVER,
        "save_total_limit": None,  # `Checkpoints` deletes old ones once the new one is whole
        "logging_steps": settings.logging_steps,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "use_liger_kernel": settings.liger,
        "report_to": settings.report_to,
        "run_name": Path(settings.output).name,
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_pin_memory": device(settings) != "cpu",
    }


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """One GPU without a launcher: transformers would copy the model to all of them and multiply the batch."""
    if processes() == 1 and arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def device(settings: TrainSettings) -> str:
    """`cpu` or `cuda`."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: got cuda, expected a CUDA device, which torch does not see: use device: cpu"
        )
    return chosen_device(None if settings.device == "auto" else settings.device).type
