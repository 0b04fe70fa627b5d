"""What a way to store a matrix in few bits has to offer; a new one is one file and one line in `names.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pissa.splits import Quantised


class Quantiser(Protocol):
    """A round trip, a packer and an unpacker.

    Attributes:
        name: what users type.
        double: whether the scales are quantised too.
    """

    name: str
    double: bool

    def quantise(self, matrix: Tensor, dtype: torch.dtype) -> Quantised:
        """Pack a matrix [out, in] and say what the packed one stands for.

        Args:
            matrix: float32 or float64.
            dtype: that the loader will unpack it in.

        Raises:
            InputError: what the packed one stands for leaves the range of `dtype`.
        """
        ...

    def dense(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The matrix [out, in] that packed parts stand for, in the dtype they name.

        Raises:
            CheckpointError: parts in an order that only one processor knows.
        """
        ...

    def plan(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part before it is made; the length of a `late` one is an upper bound."""
        ...

    def packs(self, shape: tuple[int, int]) -> bool:
        """Whether bitsandbytes computes right with a packed matrix [out, in] on every processor."""
        ...

    @property
    def late(self) -> tuple[str, ...]:
        """Parts whose length is only known once they are made."""
        ...

    def config(self, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
        """`quantization_config` for the model's config.json.

        Args:
            dtype: of the products.
            skipped: full names of the linear modules that stay as they are.
        """
        ...
