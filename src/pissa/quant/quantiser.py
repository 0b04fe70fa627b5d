"""What a way to store a matrix in few bits has to offer; a new one is one file in this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor

from pissa.splits import Quantised
from pissa.untyped import Json


class Quantiser(Protocol):
    """A round trip, a packer and an unpacker.

    Attributes:
        name: what users type.
        double: whether the scales are quantised too.
        mark: the part, other than "weight", that each packed weight has and nothing else.
    """

    name: str
    double: bool
    mark: ClassVar[str]

    def __init__(self, name: str, double: bool = False) -> None:
        """Make the quantizer of one of the names that the class was registered under.

        Args:
            name: what users type.
            double: quantize the scales too.

        Raises:
            InputError: there are no scales that could be.
            MissingExtraError: a library is absent; the message is the pip line.
        """

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The quantizer of a model with this `quantization_config`; None for another format's."""
        ...

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

    def plan(
        self, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part before it is made; the length of a `late` one is an upper bound."""
        ...

    def packs(self, shape: tuple[int, int]) -> bool:
        """Whether bitsandbytes computes right with a packed matrix [out, in] on every processor."""
        ...

    @property
    def late(self) -> tuple[str, ...]:
        """Parts whose length is only known once they are made."""
        ...

    def config(self, dtype: torch.dtype, skipped: list[str]) -> Json:
        """`quantization_config` for the model's config.json.

        Args:
            dtype: of the products.
            skipped: full names of the linear modules that stay as they are.
        """
        ...


FORMATS: dict[str, type[Quantiser]] = {}
"""What users type to the class of the format; filled by `quantizer_format`, read through `names`."""
Kind = TypeVar("Kind", bound=type[Quantiser])


def quantizer_format(*names: str) -> Callable[[Kind], Kind]:
    """Register the decorated class as the format of these names."""

    def register(kind: Kind) -> Kind:
        FORMATS.update(dict.fromkeys(names, kind))
        return kind

    return register
