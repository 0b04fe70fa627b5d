"""What enters the layers of a model when it reads a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pissa.checkpoint.fingerprint import canonical
from pissa.checkpoint.skeleton import build_skeleton
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError, InputError
from pissa.observe import observe
from pissa.surgery.packing import PACKABLE

TOKENS, WINDOW, FEWEST = 512, 256, 16
"""Tokens that are read, in windows of so many; fewer than the last say nothing."""


def layer_inputs(folder: Path, targets: Iterable[Target], text: Path) -> dict[str, Tensor]:
    """Rows [tokens, in] that enter each linear target, by module, in float32. The whole model is
    loaded.

    Args:
        folder: a model with its tokenizer.
        targets: those of another kind than linear are left out.
        text: a file in UTF-8; its first 512 tokens are read.

    Raises:
        InputError: too little text.
        CheckpointError: a model or tokenizer that transformers cannot load.
    """
    tokens = _tokens(folder, text)
    try:
        kind: Any = type(build_skeleton(folder))  # of transformers, as the config says
        model = kind.from_pretrained(folder, dtype="auto", use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({error})") from error
    linear = [target for target in targets if target.kind in PACKABLE]
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    batches = [{"input_ids": part[None]} for part in torch.split(tokens, window)]
    try:
        seen = observe(
            model, batches, "inputs", targets=[target.module for target in linear], inputs=TOKENS
        )
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} cannot read a text by itself ({error}): leave --text out"
        ) from error
    prefix = getattr(model, "base_model_prefix", "")
    return {
        target.module: seen.get("inputs", canonical(target.weight, prefix)) for target in linear
    }


def _tokens(folder: Path, text: Path) -> Tensor:
    import transformers

    try:
        content = text.read_text(encoding="utf-8")[: 16 * TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read ({error}): give a text file in UTF-8") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers loads ({error})"
        ) from error
    ids = tokenizer(content, truncation=True, max_length=TOKENS)["input_ids"]
    if len(ids) < FEWEST:
        raise InputError(
            f"{text} has {len(ids)} tokens, expected {FEWEST} or more: give a longer text"
        )
    return torch.tensor(ids)
