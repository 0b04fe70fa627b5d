"""Truncated SVD beside peft's two starts and torch's routines, in one process: medians, ratios, and
what is missed.

python benchmarks/svd.py [--shapes 4096x4096,11008x4096] [--ranks 16,128,512] [--spectra
language,flat,steep]
                         [--weights FOLDER] [--device cuda]

Constructed matrices have singular values i^-0.35 (1 - 0.95 (i/n)^1.5) ("language": a power-law head
and a long tail), 1 - i/2n ("flat") or i^-1.5 ("steep") between random orthogonal bases; --weights
takes one matrix of each shape from a checkpoint instead. "gap" is the energy missed beyond the
optimum as a share of the optimal tail, "sigma" the largest relative error of a singular value, both
against eigenvalues of the Gram matrix in float64. peft's `pissa` is torch.linalg.svd, its
`pissa_niter_k` is torch.svd_lowrank without extra columns, both on the weight cast to float32. The
engines take turns, so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from pissa.checkpoint.reader import Checkpoint
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


def lowrank(weight: torch.Tensor, rank: int, rounds: int) -> Triplets:
    U, S, V = torch.svd_lowrank(weight.float(), q=rank, niter=rounds)
    return U, S, V.T


def ours(weight: torch.Tensor, rank: int, accuracy: str) -> Triplets:
    found = truncated_svd(weight, rank, accuracy)
    return found.U, found.S, found.Vh


def lapack(weight: torch.Tensor, rank: int) -> Triplets:
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def seconds(work: Callable[[], Triplets], device: str) -> tuple[float, Triplets]:
    began = time.perf_counter()
    found = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def matrices(options: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor]]:
    if options.weights:
        checkpoint, seen = Checkpoint.open(options.weights), set()
        for name, info in checkpoint.tensors.items():
            if len(info.shape) == 2 and info.shape not in seen and "embed" not in name:
                seen.add(info.shape)
                yield (
                    f"{name.split('.')[-2]} {info.shape[0]}x{info.shape[1]}",
                    checkpoint.read(name),
                )
        return
    for shape in options.shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for spectrum in options.spectra.split(","):
            for dtype in options.dtypes.split(","):
                yield (
                    f"{shape} {spectrum} {dtype}",
                    constructed(rows, columns, spectrum, getattr(torch, dtype)),
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="2048x2048")
    parser.add_argument("--ranks", default="16,128")
    parser.add_argument("--spectra", default="language")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--weights", help="a checkpoint folder, in place of constructed matrices")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--lapack-repeats", type=int, default=1, help="of torch.linalg.svd; 0 leaves it out"
    )
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(
        f"{'matrix':34} {'rank':>4}  {'engine':17} {'seconds':>8} {'of niter_16':>11} {'gap':>9} {'sigma':>9}"
    )
    for name, weight in matrices(options):
        weight = weight.to(options.device)
        wide = weight.double()
        squares = torch.linalg.eigvalsh(
            wide.T @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.T
        ).flip(0)
        for rank in (
            rank for rank in map(int, options.ranks.split(",")) if rank < min(weight.shape)
        ):
            engines: dict[str, Callable[[], Triplets]] = {
                "pissa_niter_16": lambda w=weight, r=rank: lowrank(w, r, 16),
                "pissa_niter_4": lambda w=weight, r=rank: lowrank(w, r, 4),
                "pissa fast": lambda w=weight, r=rank: ours(w, r, "fast"),
                "pissa exact": lambda w=weight, r=rank: ours(w, r, "exact"),
                "torch.linalg.svd": lambda w=weight, r=rank: lapack(w, r),
            }
            times: dict[str, list[float]] = {engine: [] for engine in engines}
            for repeat in range(options.repeats + 1):  # the first one warms up
                for engine, work in engines.items():
                    if engine == "torch.linalg.svd" and repeat >= options.lapack_repeats:
                        continue
                    taken, found = seconds(work, options.device)
                    if repeat or engine == "torch.linalg.svd":
                        times[engine].append(taken)
                    if repeat == 0:
                        gap, sigma = missed(weight, found, squares)
                        rows.append(
                            {
                                "matrix": name,
                                "rank": rank,
                                "engine": engine,
                                "gap": gap,
                                "sigma": sigma,
                            }
                        )
            for row in rows[-sum(map(bool, times.values())) :]:
                row["seconds"] = median(times[str(row["engine"])])
                ratio = row["seconds"] / median(times["pissa_niter_16"])
                figures = (
                    f"{row['seconds']:8.3f} {ratio:11.3f} {row['gap']:9.1e} {row['sigma']:9.1e}"
                )
                print(f"{name:34} {rank:4}  {row['engine']:17} {figures}", flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "device": options.device, "rows": rows}))


if __name__ == "__main__":
    main()
