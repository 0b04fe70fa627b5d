"""Symmetric 4-bit integers in groups along the rows, and their exact product.

    scale = float16(max |group| / 7)        code = round(value / scale), clipped to -7..7        value ~ code * scale

as in SVDQuant (arXiv 2411.05007, section 5.1; deepcompressor). Codes are taken with the scale as it
is stored, so its rounding to float16 clips the largest value by 2^-11 of it at most (by more where
a scale is below float16's normal 6e-5). Weights and activations go through the same function, an
activation's scales being of one token. Ties round to even; -8 is never used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from pissa.errors import InputError

GROUP = 64
"""Values that share a scale; where a row is no multiple of it, its last group is shorter."""
LARGEST = 7


@dataclass(frozen=True, eq=False)
class Int4:
    """A matrix in 4-bit integers.

    Attributes:
        codes: int8 [rows, columns], -7 to 7.
        scales: float16 [rows, ceil(columns / group)]; 0 where a group is zero, infinite where it
            leaves float16.
        group: values that share a scale.
    """

    codes: Tensor
    scales: Tensor
    group: int = GROUP

    def dense(self) -> Tensor:
        """What the codes stand for, float32 [rows, columns]; no product of code and scale is rounded."""
        steps = self.scales.float().repeat_interleave(self.group, dim=1)
        return self.codes.float() * steps[:, : self.codes.shape[1]]


def quantise(matrix: Tensor, group: int = GROUP) -> Int4:
    """Round a matrix to 4-bit integers, each row on its own.

    Args:
        matrix: [rows, columns], any float dtype; computed in at least float32.
        group: values that share a scale, 1 or more.
    """
    columns = matrix.shape[1]
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    grouped = torch.unflatten(pad(wide, (0, -columns % group)), 1, (-1, group))
    scales = (grouped.abs().amax(2) / LARGEST).to(torch.float16)
    steps = torch.where(scales == 0, 1, scales.to(wide.dtype))
    codes = (grouped / steps[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Int4(codes.flatten(1)[:, :columns], scales, group)


def product(left: Int4, right: Int4) -> Tensor:
    """``left @ right.T`` as integer hardware computes it, float32 [left rows, right rows].

    Codes are multiplied and summed within a group as integers (exact in float32: no sum exceeds 64
    * 49), then scaled by both scales and summed over the groups in float32.

    Raises:
        InputError: other columns or groups.
    """
    if left.codes.shape[1] != right.codes.shape[1] or left.group != right.group:
        raise InputError(
            f"rows of {left.codes.shape[1]} values in groups of {left.group} meet rows of {right.codes.shape[1]} in "
            f"groups of {right.group}, expected the same: quantise both alike"
        )
    total = torch.zeros(len(left.codes), len(right.codes), device=left.codes.device)
    ours, theirs = (torch.split(each.codes.float(), each.group, dim=1) for each in (left, right))
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        scaled = (one @ other.T) * left.scales[:, index, None].float()
        total.addcmul_(scaled, right.scales[:, index].float())
    return total


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, two's complement, the even column in the low half: uint8 [rows, ceil(columns / 2)]."""
    halves = (pad(codes, (0, codes.shape[1] % 2)) & 0xF).to(torch.uint8)
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes that `pack` packed, int8 [rows, columns]."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)[:, :columns].to(torch.int8)
    return torch.where(halves > LARGEST, halves - 16, halves)
