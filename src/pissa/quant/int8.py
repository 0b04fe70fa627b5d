"""LLM.int8 through bitsandbytes (arXiv 2208.07339): 8 bits and one scale per row, in the files that
transformers loads.

Rows are rounded in float16, as bitsandbytes does when it quantises a layer itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pissa.errors import InputError, require
from pissa.quant.quantiser import quantizer_format
from pissa.splits import Quantised, is_finite
from pissa.untyped import Json

ROWS = 256
"""Rows that are worked on at a time."""
LARGEST = 127


@quantizer_format("int8")
class Int8:
    """Symmetric 8 bits, row by row.

    Args:
        name: what users type.
        double: there are no scales of blocks, so never true.

    Raises:
        InputError: double.
        MissingExtraError: bitsandbytes is absent.
    """

    mark: ClassVar[str] = "SCB"
    double: bool = False

    def __init__(self, name: str = "int8", double: bool = False) -> None:
        if double:
            raise InputError(
                "double quantisation is of block scales, which int8 has not: leave --double-quant out"
            )
        self.name = name
        self._functional: Any = require("bitsandbytes.functional", "quant")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self | None:
        """See `Quantiser.of_config`."""
        ours = config.get("quant_method") == "bitsandbytes" and config.get("load_in_8bit")
        return cls() if ours else None

    def quantise(self, matrix: Tensor, dtype: torch.dtype) -> Quantised:
        """See `Quantiser.quantise`."""
        codes, scales = [], []
        for rows in torch.split(matrix, ROWS):
            half = rows.to(torch.float16).contiguous()
            if not is_finite(half):
                raise InputError(
                    "a value is above float16's 65504, in which int8 rows are rounded: use nf4"
                )
            packed, scale, _ = self._functional.int8_vectorwise_quant(half)
            codes.append(packed)
            scales.append(scale)
        parts = {
            "weight": torch.cat(codes),
            "SCB": torch.cat(scales).float(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return Quantised(parts, self.dense(parts).to(dtype))

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Quantiser.dense`; float32, as the parts name no dtype."""
        return parts["weight"].float() * (parts["SCB"] / LARGEST)[:, None]

    def plan(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `Quantiser.plan`."""
        return {
            "weight": (torch.int8, shape),
            "SCB": (torch.float32, shape[:1]),
            "weight_format": (torch.uint8, ()),
        }

    def packs(self, shape: tuple[int, int]) -> bool:
        """See `Quantiser.packs`."""
        return True

    @property
    def late(self) -> tuple[str, ...]:
        """See `Quantiser.late`."""
        return ()

    def config(self, dtype: torch.dtype, skipped: list[str]) -> Json:
        """See `Quantiser.config`."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skipped,
        }
