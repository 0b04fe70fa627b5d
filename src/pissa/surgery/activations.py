"""What enters the layers of a model when it reads a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pissa.checkpoint.skeleton import build_skeleton
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError, InputError
from pissa.surgery.packing import PACKABLE

TOKENS, WINDOW, FEWEST = 512, 256, 16
"""Tokens that are read, in windows of so many; fewer than the last say nothing."""


def layer_inputs(folder: Path, targets: Iterable[Target], text: Path) -> dict[str, Tensor]:
    """Rows [tokens, in] that enter each linear target, by module, in the model's dtype. The whole model is loaded.

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
        model = type(build_skeleton(folder)).from_pretrained(folder, dtype="auto", use_safetensors=True).eval()  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({error})") from error
    rows: dict[str, list[Tensor]] = {target.module: [] for target in targets if target.kind in PACKABLE}

    def keep(name: str) -> Any:
        return lambda module, inputs: rows[name].append(inputs[0].detach().flatten(0, -2))

    modules: dict[str, nn.Module] = dict(model.named_modules())
    for name in rows:
        modules[name].register_forward_pre_hook(keep(name))
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    try:
        with torch.no_grad():
            for part in tokens.split(window):
                model(input_ids=part[None])
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot read a text by itself ({error}): leave --text out") from error
    return {name: torch.cat(parts) for name, parts in rows.items() if parts}


def _tokens(folder: Path, text: Path) -> Tensor:
    import transformers

    try:
        content = text.read_text(encoding="utf-8")[: 16 * TOKENS]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text} cannot be read ({error}): give a text file in UTF-8") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that transformers loads ({error})") from error
    ids = tokenizer(content, truncation=True, max_length=TOKENS)["input_ids"]
    if len(ids) < FEWEST:
        raise InputError(f"{text} has {len(ids)} tokens, expected {FEWEST} or more: give a longer text")
    return torch.tensor(ids)
