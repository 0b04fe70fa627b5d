"""Base model and tokenizer from a folder or the Hub: safetensors only, no remote code unless asked for."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
import transformers

from pissa.checkpoint.reader import Checkpoint
from pissa.config import TrainSettings
from pissa.errors import CheckpointError, ConfigError
from pissa.untyped import Tokenizer

logger = logging.getLogger(__name__)


def load_tokenizer(settings: TrainSettings) -> Any:
    """The model's tokenizer."""
    return _load(settings, transformers.AutoTokenizer)


def load_base(settings: TrainSettings, auto: str, **options: Any) -> tuple[Any, list[str]]:
    """The model, in its dtype, and the names of the tensors that the checkpoint lacks.

    Args:
        settings: model, revision, dtype and seed are read; the seed decides weights that are new.
        auto: a class of transformers, AutoModelForCausalLM for one.
        options: for the model's config.

    Raises:
        CheckpointError: no safetensors, not such a model, or tensors that do not fit.
    """
    if Path(settings.model).exists():
        Checkpoint.open(settings.model)  # clear errors for pickles, torn files and bad indexes
    if settings.attn_implementation != "auto":
        options["attn_implementation"] = settings.attn_implementation
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    transformers.set_seed(settings.seed)
    model, report = _load(
        settings,
        getattr(transformers, auto),
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    if report["mismatched_keys"]:
        raise CheckpointError(
            f"{settings.model} has tensors of another shape than its config.json says: {report['mismatched_keys']}"
        )
    if (
        settings.attn_implementation.startswith("flash")
        and model.dtype == torch.float32
        and not settings.bf16
    ):
        raise ConfigError(
            f"attn_implementation: got {settings.attn_implementation} on a float32 model, expected bf16: true or "
            "dtype: bfloat16 beside it"
        )
    if settings.liger:
        _check_liger(model.config.model_type)
    return model, sorted(report["missing_keys"])


def position_limit(tokenizer: Tokenizer, settings: TrainSettings) -> int:
    """max_length, or less where the model has fewer positions."""
    config = _load(settings, transformers.AutoConfig)
    most = min(
        getattr(config, "max_position_embeddings", None) or settings.max_length,
        tokenizer.model_max_length,
    )
    if most < settings.max_length:
        logger.warning(
            "max_length %d is more than the model takes: rows are cut at %d tokens",
            settings.max_length,
            most,
        )
    return int(min(most, settings.max_length))


def _check_liger(model_type: str) -> None:
    """transformers only warns of a model without such kernels."""
    known = importlib.import_module(
        "liger_kernel.transformers.monkey_patch"
    ).MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise ConfigError(
            f"liger: got true, expected false for a model of type {model_type}: it has no such kernels"
        )


def _load(settings: TrainSettings, auto: Any, **options: Any) -> Any:
    try:
        return auto.from_pretrained(
            settings.model,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "attn_implementation" in options and "attention" in str(error).lower():
            raise ConfigError(
                f"attn_implementation: got {settings.attn_implementation}, which {settings.model} does not offer "
                f"({error}): use auto"
            ) from error
        raise CheckpointError(
            f"{settings.model} cannot be loaded as {auto.__name__} ({error}): give a Hugging Face folder or a Hub id "
            "with config, tokenizer and safetensors"
        ) from error
