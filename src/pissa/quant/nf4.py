"""NF4 and FP4 through bitsandbytes (arXiv 2305.14314, sections 3 and appendix E), in the files that
transformers loads.

64 values in a row share a scale; double quantisation stores the scales in 8 bits. The codes are
those of bitsandbytes, a piece of the matrix at a time, so that no more than a piece is ever held
wide.

The traps, on processors with AVX512: at a layer's first forward without gradients bitsandbytes
repacks its codes and rounds its scales to bf16, for good, even in the state dict; such parts are
refused. And where rows are not whole blocks its kernels take the wrong scales, so such matrices are
not packed (`packs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pissa.errors import CheckpointError, InputError, require
from pissa.quant.codebook import Codebook
from pissa.quant.quantiser import quantizer_format
from pissa.splits import Quantised, is_finite
from pissa.untyped import Json

BLOCK, NESTED_BLOCK = 64, 256
"""Values per scale, and scales per scale of scales."""
PIECE = 2**20
"""Values that are worked on at a time."""
ROWS = 32
"""bitsandbytes' repacking takes so many rows at a time."""
UNPACKED = (torch.float32, torch.bfloat16, torch.float16)
STATE_BYTES = 256
"""More than the JSON of any quantisation state takes."""


@quantizer_format("nf4", "fp4")
class FourBit:
    """NF4 ("nf4": the quantiles of a normal distribution) or FP4 ("fp4").

    Args:
        name: which code book.
        double: quantise the scales too.

    Raises:
        MissingExtraError: bitsandbytes is absent.
    """

    mark: ClassVar[str] = "weight.absmax"

    def __init__(self, name: str, double: bool = False) -> None:
        self.name, self.double = name, double
        self._functional: Any = require("bitsandbytes.functional", "quant")
        self._values = self._functional.get_4bit_type(name, "cpu")
        self._codebook = Codebook(self._values)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self | None:
        """See `Quantiser.of_config`."""
        name = config.get("bnb_4bit_quant_type")
        if config.get("quant_method") != "bitsandbytes" or config.get("load_in_8bit"):
            return None
        double = bool(config.get("bnb_4bit_use_double_quant"))
        return cls(name, double) if name in ("nf4", "fp4") else None

    def quantise(self, matrix: Tensor, dtype: torch.dtype) -> Quantised:
        """See `Quantiser.quantise`."""
        F = self._functional
        dtype = dtype if dtype in UNPACKED else torch.float32
        codes, scales = [], []
        for piece in torch.split(matrix.contiguous().reshape(-1), PIECE):
            packed, scale = self._packed(piece.float())
            codes.append(packed)
            scales.append(scale)
        absmax = torch.cat(scales)
        nested: dict[str, Any] = {}
        if self.double:
            offset = absmax.mean()
            absmax, outer = F.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            nested = {"offset": offset, "state2": outer}
        state = F.QuantState(
            absmax, matrix.shape, self._values.to(matrix.device), BLOCK, self.name, dtype, **nested
        )
        packed = torch.cat(codes)
        parts = {
            "weight": packed,
            **{f"weight.{key}": part for key, part in state.as_dict(packed=True).items()},
        }
        dense = self._dense(packed, state)
        if dtype == torch.float16 and not is_finite(dense):
            raise InputError("the quantised weight is beyond float16's 65504: use --dtype bfloat16")
        return Quantised(parts, dense)

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """See `Quantiser.dense`."""
        rest = {key: part for key, part in parts.items() if key != "weight"}
        packed = parts["weight"]
        if rest["weight.absmax"].ndim != 1:
            raise CheckpointError(
                "scales in the order that bitsandbytes gives them on this processor, rounded to bf16: the model was "
                "run before it was saved or read, take it as it was before"
            )
        return self._dense(
            packed, self._functional.QuantState.from_dict(rest, device=packed.device)
        )

    def plan(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `Quantiser.plan`."""
        values = prod(shape)
        blocks = -(-values // BLOCK)
        plan = {
            "weight": (torch.uint8, (-(-values // 2), 1)),
            "weight.absmax": (torch.uint8 if self.double else torch.float32, (blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
        }
        if self.double:
            plan["weight.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK),))
            plan["weight.nested_quant_map"] = (torch.float32, (256,))
        return {**plan, self.late[0]: (torch.uint8, (STATE_BYTES,))}

    def packs(self, shape: tuple[int, int]) -> bool:
        """See `Quantiser.packs`."""
        return shape[0] % ROWS == 0 and shape[1] % BLOCK == 0

    @property
    def late(self) -> tuple[str, ...]:
        """See `Quantiser.late`."""
        return (f"weight.quant_state.bitsandbytes__{self.name}",)

    def config(self, dtype: torch.dtype, skipped: list[str]) -> Json:
        """See `Quantiser.config`."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.double,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    def _packed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, two in a byte, and the scales of the blocks; on a processor the same bits, sooner."""
        if values.device.type != "cpu" or values.numel() % BLOCK:
            packed, state = self._functional.quantize_4bit(
                values, blocksize=BLOCK, quant_type=self.name
            )
            return packed, state.absmax
        blocks = values.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        codes = self._codebook.codes(
            (blocks * (1 / scales.clamp_min(1e-38))[:, None]).clamp_(-1, 1).view(-1)
        )
        return ((codes[::2] << 4) | codes[1::2])[:, None], scales

    def _dense(self, packed: Tensor, state: Any) -> Tensor:
        dense = torch.empty(prod(state.shape), dtype=state.dtype, device=packed.device)
        scales = self._scales(state)
        sizes = ((packed, PIECE // 2), (scales, PIECE // BLOCK), (dense, PIECE))
        pieces = (torch.split(tensor, size) for tensor, size in sizes)
        for codes, absmax, out in zip(*pieces, strict=True):
            piece = self._functional.QuantState(
                absmax, out.shape, state.code, BLOCK, self.name, state.dtype
            )
            out.copy_(self._functional.dequantize_4bit(codes, piece).reshape(-1))
        return dense.reshape(state.shape)

    def _scales(self, state: Any) -> Tensor:
        scales: Tensor = state.absmax
        if state.nested:
            scales = self._functional.dequantize_blockwise(scales, state.state2) + state.offset
        return scales
