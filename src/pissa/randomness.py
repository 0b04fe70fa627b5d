"""Random numbers that depend on nothing but a seed and a tensor's name, and the starts that are made of them."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from pissa.splits import Split


def tensor_seed(seed: int, name: str) -> int:
    """A 63-bit seed from the run's seed and the tensor's name, equal on every machine."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def noise_beside_zero(weight: Tensor, rank: int, scale: float, seed: int) -> Split:
    """LoRA's start (arXiv 2106.09685): zero on the left, ``U(-1/sqrt(in), 1/sqrt(in))`` on the
    right.

    Args:
        weight: [out, in].
        rank: r, the rows of the right factor.
        scale: alpha / rank; the product is zero whatever it is.
        seed: see `tensor_seed`; drawn on the CPU, so equal on every device.
    """
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(rank, columns, generator=generator, dtype=torch.float64)
    right = ((2 * uniform - 1) / columns**0.5).to(
        weight.device, torch.promote_types(weight.dtype, torch.float32)
    )
    return Split(weight, right.new_zeros(rows, rank), right, scale=scale)


def random_control(split: Split, seed: int) -> Split:
    """The same split along random directions: what remains of a method when only the sizes of its
    factors are kept.

    The columns of `left` and the rows of `right` become random orthonormal vectors with the norms
    they had. For factors along singular vectors (PiSSA, MiLoRA) the product keeps its singular
    values. A zero factor stays zero. As for any split the frozen part is ``W - scale * left @
    right``, so the model starts where it was.

    Args:
        split: of a method, not quantised; a core stays as it is.
        seed: see `tensor_seed`; drawn on the CPU, so equal on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(factor: Tensor) -> Tensor:
        noise = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
        basis: Tensor = torch.linalg.qr(noise)[0]
        norms: Tensor = factor.norm(dim=0)
        return basis.to(factor) * norms

    return dataclasses.replace(
        split, left=directions(split.left), right=directions(split.right.T).T.contiguous()
    )
