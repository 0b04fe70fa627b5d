"""What lies beside the tensors of a decomposed folder: configs, tokenizer, records."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from pissa.adapters import plain
from pissa.adapters.plain import INIT
from pissa.checkpoint.output import write_json
from pissa.checkpoint.targets import Target, short_names
from pissa.records import Base, Recipe, Record
from pissa.untyped import Json


def write_small_files(
    staging: Path,
    companions: Iterable[Path],
    config: Json,
    start_config: Json,
    record: Record,
) -> None:
    """Config, tokenizer, adapter config; the records last.

    Args:
        staging: the folder that is being made, its tensors written.
        companions: files of the base that go along.
        config: `config.json`, JSON.
        start_config: `adapter_config.json` of the start, JSON.
        record: of kind "residual".
    """
    for file in companions:
        shutil.copyfile(file, staging / file.name)
    write_json(staging / "config.json", config)
    write_json(staging / INIT / plain.CONFIG, start_config)
    start_record = dataclasses.replace(record, kind="init")
    write_json(staging / INIT / plain.RECORD, start_record.to_json())
    write_json(staging / plain.RECORD, record.to_json())


def residual_config(
    config: Json,
    recipe: Recipe,
    base: Base,
    dtype: torch.dtype,
    packing: Json | None,
) -> Json:
    """`config.json` of the residual; transformers carries unknown keys along, so it says what it is
    wherever it is saved again.

    Args:
        config: of the base, JSON.
        recipe: how it was split.
        base: its name and fingerprint.
        dtype: of the weights.
        packing: `quantization_config` where weights are in few bits, JSON.
    """
    note = {
        "kind": "residual",
        "base": base.name,
        "method": recipe.method,
        "rank": recipe.rank,
        "quant": recipe.quant,
        "fingerprint": base.fingerprint,
    }
    written = {**config, "pissa": note, "dtype": str(dtype).removeprefix("torch.")}
    written.pop("torch_dtype", None)
    return written | ({"quantization_config": packing} if packing else {})


def init_config(recipe: Recipe, targets: list[Target], skeleton: nn.Module, final: Path) -> Json:
    """The adapter config of the start: it names the residual's folder, where alone it is right."""
    name = type(skeleton).__name__
    return plain.adapter_config(
        rank=recipe.rank,
        alpha=recipe.alpha,
        base=str(final.resolve()),
        revision=None,
        target_modules=short_names(targets, skeleton),
        transposed="conv1d" in recipe.targets.values(),
        task_type="CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        ranks=recipe.ranks,
    )
