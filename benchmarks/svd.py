"""Truncated SVD beside peft's two starts and torch's routines, in one process: medians, ratios, and what is missed.

python benchmarks/svd.py [--shapes 4096x4096,11008x4096] [--ranks 16,128,512] [--spectra language,flat,steep]

"gap" is the energy missed beyond the optimum as a share of the optimal tail; "sigma" the largest relative error of a
singular value; both against eigenvalues of the Gram matrix in float64. peft's `pissa` is torch.linalg.svd, its
`pissa_niter_k` is torch.svd_lowrank without extra columns, both on the weight cast to float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from pissa.linalg import truncated_svd

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def constructed(rows: int, columns: int, spectrum: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix with the given singular values between random orthogonal bases, seeded."""
    torch.manual_seed(0)
    small = min(rows, columns)
    index = torch.arange(1, small + 1, dtype=torch.float32)
    values = {
        "language": index**-0.35 * (1 - 0.95 * (index / small) ** 1.5),
        "flat": 1 - 0.5 * index / small,
        "steep": index**-1.5,
    }[spectrum]
    left, right = (torch.linalg.qr(torch.randn(size, small)).Q for size in (rows, columns))
    return ((left * values) @ right.T).to(dtype)


def missed(weight: torch.Tensor, found: Triplets, squares: torch.Tensor) -> tuple[float, float]:
    """(gap, sigma) of the triplets."""
    U, S, Vh = (part.double() for part in found)
    rank = len(S)
    left = U * S
    captured = 2 * ((left.T @ weight.double()) * Vh).sum() - ((left.T @ left) * (Vh @ Vh.T)).sum()
    best, tail = squares[:rank].sum(), squares[rank:].sum()
    sigma = ((S - squares[:rank].sqrt()).abs() / squares[:rank].sqrt()).max()
    return float((best - captured) / tail), float(sigma)


def timed(work: Callable[[], Triplets], repeats: int) -> tuple[float, Triplets]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        found = work()
        times.append(time.perf_counter() - began)
    return median(times), found


def lowrank(weight: torch.Tensor, rank: int, rounds: int) -> Triplets:
    U, S, V = torch.svd_lowrank(weight.float(), q=rank, niter=rounds)
    return U, S, V.T


def ours(weight: torch.Tensor, rank: int, accuracy: str) -> Triplets:
    found = truncated_svd(weight, rank, accuracy)
    return found.U, found.S, found.Vh


def exact(weight: torch.Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="2048x2048")
    parser.add_argument("--ranks", default="16,128")
    parser.add_argument("--spectra", default="language")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-exact", action="store_true", help="leave out torch.linalg.svd")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(f"{'matrix':34} {'rank':>4}  {'engine':18} {'seconds':>8} {'of niter_16':>11} {'gap':>9} {'sigma':>9}")
    for shape in options.shapes.split(","):
        height, width = map(int, shape.split("x"))
        for spectrum in options.spectra.split(","):
            for dtype in options.dtypes.split(","):
                weight = constructed(height, width, spectrum, getattr(torch, dtype))
                wide = weight.double()
                squares = torch.linalg.eigvalsh(wide.T @ wide if height >= width else wide @ wide.T).flip(0)
                full = None if options.no_exact else timed(lambda w=weight: exact(w, 1), 1)[0]
                for rank in map(int, options.ranks.split(",")):
                    engines: dict[str, Callable[[], Triplets]] = {
                        "pissa_niter_16": lambda w=weight, r=rank: lowrank(w, r, 16),
                        "pissa_niter_4": lambda w=weight, r=rank: lowrank(w, r, 4),
                        "pissa fast": lambda w=weight, r=rank: ours(w, r, "fast"),
                        "pissa exact": lambda w=weight, r=rank: ours(w, r, "exact"),
                    }
                    base = 0.0
                    for engine, work in engines.items():
                        seconds, found = timed(work, options.repeats)
                        base = base or seconds
                        gap, sigma = missed(weight, found, squares)
                        name = f"{shape} {spectrum} {dtype}"
                        figures = f"{seconds:8.3f} {seconds / base:11.3f} {gap:9.1e} {sigma:9.1e}"
                        print(f"{name:34} {rank:4}  {engine:18} {figures}")
                        rows.append({"matrix": name, "rank": rank, "engine": engine, "seconds": seconds, "gap": gap})
                    if full:
                        print(f"{name:34} {rank:4}  {'torch.linalg.svd':18} {full:8.3f} {full / base:11.3f}")
                        rows.append({"matrix": name, "rank": rank, "engine": "torch.linalg.svd", "seconds": full})
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
