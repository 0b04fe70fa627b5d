"""Matrices with given singular values, and what a decomposition of them missed against LAPACK in float64."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from pissa.linalg import LowRank

KINDS = (
    "language", "flat", "steep", "exponential", "equal", "plateau", "steps", "deficient", "outlier", "random",
    "nearly low rank",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANKS = (1, 2, 3, 5, 8, 16, 20, 32, 50, 64, 100)


def spectrum(kind: str, size: int, generator: torch.Generator) -> Tensor:
    """`size` singular values, descending, float64."""
    index = torch.arange(1, size + 1, dtype=torch.float64)
    somewhere = int(torch.randint(1, size // 3, (1,), generator=generator))
    noise = torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values
    flat = torch.ones(size, dtype=torch.float64)
    return {
        "language": index**-0.35 * (1 - 0.95 * (index / size) ** 1.5),
        "flat": 1 - 0.5 * index / size,
        "steep": index**-1.5,
        "exponential": 10.0 ** (-6 * index / size),
        "equal": flat,
        "plateau": torch.where(index <= somewhere, flat, 0.1 * index**-0.3),
        "steps": 2.0 ** -torch.floor(8 * index / size),
        "deficient": torch.where(index <= somewhere, index**-0.5, 0 * flat),
        "outlier": torch.where(index == 1, flat, 0.02 * index**-0.3),
        "random": noise,
        "nearly low rank": torch.where(index <= somewhere, 1 + noise, 1e-3 * index**-0.1),
    }[kind]


def with_values(values: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix [rows, columns] with these singular values between random orthonormal bases, float64."""
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    return (left * values) @ right.T


def drawn(seed: int) -> tuple[str, Tensor, int]:
    """One of many cases: its kind, the matrix, the rank."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    kind, dtype = choose.choice(KINDS), choose.choice(DTYPES)
    rows, columns = choose.randint(100, 400), choose.randint(100, 400)
    size = choose.choice((1.0, 1.0, 1e-3, 1e3, 1e30, 1e-30)) if dtype != torch.float16 else 1.0
    values = size * spectrum(kind, min(rows, columns), generator)
    weight = with_values(values, rows, columns, generator).to(dtype)
    return (
        f"{kind} {rows}x{columns} {dtype} {size:g}",
        weight,
        min(choose.choice(RANKS), rows, columns),
    )


def missed(weight: Tensor, found: LowRank, true: Tensor) -> tuple[float, float]:
    """(sigma, gap): the errors that a certificate bounds, against `true` singular values in float64."""
    largest, rank = true[0], len(found.S)
    weight, true = weight.double() / largest, true / largest
    U, S, Vh = found.U.double(), found.S.double() / largest, found.Vh.double()
    left = U * S
    captured = 2 * ((left.T @ weight) * Vh).sum() - ((left.T @ left) * (Vh @ Vh.T)).sum()
    energies = true.square()
    tail = energies[rank:].sum().clamp_min(torch.finfo(torch.float32).eps * energies.sum())
    errors = (S - true[:rank]).abs() / torch.where(true[:rank] > 1e-6, true[:rank], torch.ones(()))
    return float(errors.max()), float((energies[:rank].sum() - captured) / tail)
