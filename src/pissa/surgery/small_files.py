"""What lies beside the tensors of a decomposed folder: configs, tokenizer, records."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pissa.adapters import plain
from pissa.adapters.plain import INIT
from pissa.checkpoint.output import write_json
from pissa.checkpoint.targets import short_names
from pissa.records import Record
from pissa.surgery.packing import quantisation_config

if TYPE_CHECKING:
    from pissa.surgery.decomposition import Decomposition


def write_small_files(job: Decomposition, staging: Path, final: Path, record: Record) -> None:
    """Config, tokenizer, adapter config; the records last."""
    for file in job.checkpoint.companions():
        shutil.copyfile(file, staging / file.name)
    config = json.loads((staging / "config.json").read_text())
    assert record.base is not None
    # transformers carries unknown keys along, so the residual says what it is wherever it is saved again.
    config["pissa"] = {
        "kind": "residual",
        "base": record.base.name,
        "method": job.recipe.method,
        "rank": job.recipe.rank,
        "quant": job.recipe.quant,
        "fingerprint": record.base.fingerprint,
    }
    dtype = next(job.dtypes[name] for name in job.targets)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    if job.packed and job.packer:
        config["quantization_config"] = quantisation_config(job.packer, job.skeleton, job.packed, dtype)
    write_json(staging / "config.json", config)
    write_json(staging / INIT / plain.CONFIG, _init_config(job, final))
    write_json(staging / INIT / plain.RECORD, dataclasses.replace(record, kind="init").to_json())
    write_json(staging / plain.RECORD, record.to_json())


def _init_config(job: Decomposition, final: Path) -> dict[str, Any]:
    """The adapter config of the start: it names the residual's folder, where alone it is right."""
    name = type(job.skeleton).__name__
    return plain.adapter_config(
        rank=job.recipe.rank,
        alpha=job.recipe.alpha,
        base=str(final.resolve()),
        revision=None,
        target_modules=short_names(list(job.targets.values()), job.skeleton),
        transposed="conv1d" in job.recipe.targets.values(),
        task_type="CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None,
        ranks=job.recipe.ranks,
    )
