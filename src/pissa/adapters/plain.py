"""The plain LoRA folder that every tool reads: stock peft keys, one rank, the scale folded into B, nothing unknown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pissa.adapters import factors
from pissa.checkpoint.output import write_json
from pissa.checkpoint.targets import Target
from pissa.records import Record
from pissa.splits import Lora
from pissa.untyped import Json

WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "pissa.json"
INIT = "pissa_init"
"""The folder beside a residual that holds its start."""
START = "core/start.safetensors"
"""In that folder: the factors, core and pattern of a start with a core, of which the stock pair is
the product. In a folder of its own, because an adapter's folder holds one file of tensors."""


def adapter_config(
    *,
    rank: int,
    alpha: float,
    base: str,
    revision: str | None,
    target_modules: list[str],
    transposed: bool,
    task_type: str | None = None,
    modules_to_save: list[str] | None = None,
    ranks: dict[str, int] | None = None,
) -> Json:
    """The keys of adapter_config.json that all versions of peft and the serving engines understand."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": whole(alpha),
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "modules_to_save": modules_to_save or None,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": ranks or {},
        "alpha_pattern": {
            module: whole(alpha / rank * own) for module, own in (ranks or {}).items()
        },
    }


def whole(number: float) -> int | float:
    """An integer where it is one: some readers of adapter_config.json take no other alpha."""
    return int(number) if float(number).is_integer() else number


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """A safetensors file that others may read as the user's settings say, as all files beside it."""
    save_file(tensors, file, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)  # safetensors makes it the owner's alone


def write_plain_lora(
    folder: Path,
    changes: Mapping[Target, Lora],
    extras: Mapping[str, Tensor],
    config: Json,
    record: Record,
) -> None:
    """Write weights, then the config, then `pissa.json`.

    Args:
        folder: exists and is empty.
        changes: each target's change, scale folded in; padded to one rank here.
        extras: tensors of modules that trained whole, under their file names.
        config: from `adapter_config`, its rank and alpha are set here.
        record: of kind "lora".
    """
    rank = max(change.rank for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for target, change in changes.items():
        pair = change.padded(rank)
        tensors.update(factors.file_tensors(target, pair.B, pair.A))
    tensors.update(extras)
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_tensors(plain, folder / WEIGHTS)
    write_json(folder / CONFIG, {**config, "r": rank, "lora_alpha": rank})
    write_json(folder / RECORD, record.to_json())
