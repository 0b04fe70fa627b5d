"""Fine-tune a language model from its own principal directions, and get a plain LoRA back.

Public names are imported on first use, so that `pissa --help` never waits for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pissa.adapters.attach import attach
    from pissa.adapters.runs import load, restart, save
    from pissa.adapters.splitting import split
    from pissa.errors import PissaError
    from pissa.observe import Observations
    from pissa.splits import Lora, Split
    from pissa.surgery.convert import convert
    from pissa.surgery.decompose import decompose
    from pissa.surgery.inspection import inspect
    from pissa.surgery.merge import merge
    from pissa.training import train

__version__ = "0.1.0"

_HOMES = {
    "Lora": "pissa.splits",
    "Observations": "pissa.observe",
    "PissaError": "pissa.errors",
    "Split": "pissa.splits",
    "attach": "pissa.adapters.attach",
    "convert": "pissa.surgery.convert",
    "decompose": "pissa.surgery.decompose",
    "inspect": "pissa.surgery.inspection",
    "load": "pissa.adapters.runs",
    "merge": "pissa.surgery.merge",
    "restart": "pissa.adapters.runs",
    "save": "pissa.adapters.runs",
    "split": "pissa.adapters.splitting",
    "train": "pissa.training",
}

__all__ = [
    "Lora",
    "Observations",
    "PissaError",
    "Split",
    "attach",
    "convert",
    "decompose",
    "inspect",
    "load",
    "merge",
    "restart",
    "save",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pissa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
