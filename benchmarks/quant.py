"""Starts on an NF4 base beside the authors' procedure, in one process: what they save of the error,
and seconds.

python benchmarks/quant.py [--shapes 2048x2048,4096x4096] [--ranks 16,64,128] [--weights FOLDER]
[--no-nuclear]

Errors are reductions in per cent, 100 (1 - |W - Q - B A| / |W - nf4(W)|), as in PiSSA's paper, in
the nuclear and the Frobenius norm; QLoRA has 0. Constructed matrices are bf16 with the "language"
spectrum of svd.py. --weights takes all matrices of a checkpoint but embeddings and lm_head whose
smaller side is at least four times the rank: "nuclear" and "frobenius" then compare sums of nuclear
norms and roots of summed squares, "mean" is of each matrix's reduction.

"authors" is their procedure at its simplest: torch.linalg.svd of the whole matrix in float32 and
bitsandbytes, T times. QPiSSA ends on quantizing there, ours with one more SVD. Q is unpacked to
float32 everywhere. "of authors" divides seconds by those of the authors' QPiSSA with T=5. The
engines take turns.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from svd import constructed, seconds

from pissa.checkpoint.reader import Checkpoint
from pissa.linalg import frobenius, nuclear
from pissa.method import Quantisation
from pissa.quant import quantiser
from pissa.registry import get

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # Q, B, A
NOT_LINEAR = ("embed", "lm_head", "wte", "wpe")
COLUMNS = ("nuclear", "frobenius", "mean nuclear", "mean frobenius")


def nf4(matrix: torch.Tensor) -> torch.Tensor:
    return dequantize_4bit(*quantize_4bit(matrix, blocksize=64, quant_type="nf4"))


def principal(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def authors(weight: torch.Tensor, rank: int, rounds: int, method: str) -> Parts:
    wide = rest = weight.float()
    for _ in range(rounds):
        if method == "loftq":
            Q = nf4(rest)
            B, A = principal(wide - Q, rank)
            rest = wide - B @ A
        else:
            B, A = principal(rest, rank)
            Q = nf4(wide - B @ A)
            rest = wide - Q
    return Q, B, A


def ours(weight: torch.Tensor, rank: int, method: str, rounds: int) -> Parts:
    packer = quantiser("nf4")
    quantisation = Quantisation(lambda matrix: packer.quantise(matrix, torch.float32), rounds)
    split = get(method).split(weight, rank, svd="fast", quantisation=quantisation)
    return split.frozen, split.left, split.right


def engines(weight: torch.Tensor, rank: int) -> dict[str, Callable[[], Parts]]:
    table: dict[str, Callable[[], Parts]] = {"qlora": partial(ours, weight, rank, "lora", 1)}
    for T in (1, 5):
        table[f"loftq T={T}"] = partial(ours, weight, rank, "loftq", T)
        table[f"qpissa T={T}"] = partial(ours, weight, rank, "pissa", T)
        table[f"authors loftq T={T}"] = partial(authors, weight, rank, T, "loftq")
        table[f"authors qpissa T={T}"] = partial(authors, weight, rank, T, "qpissa")
    return table


def norms(matrix: torch.Tensor, with_nuclear: bool) -> tuple[float, float]:
    return nuclear(matrix) if with_nuclear else math.nan, frobenius(matrix)


def measured(
    weight: torch.Tensor, rank: int, options: argparse.Namespace
) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds by engine, without the first of several runs; norms [1 + engines, 2] of what is missed, nf4(W) first."""
    table = engines(weight, rank)
    times: dict[str, list[float]] = {engine: [] for engine in table}
    errors = [norms(weight.float() - nf4(weight.float()), options.nuclear)]
    for repeat in range(options.repeats + 1):
        for engine, work in table.items():
            if engine.startswith("authors") and repeat >= options.lapack_repeats:
                continue
            taken, (Q, B, A) = seconds(work, options.device)
            times[engine].append(taken)
            if repeat == 0:
                errors.append(norms(weight.float() - Q - B @ A, options.nuclear))
    return {engine: median(t[1:] or t) for engine, t in times.items()}, torch.tensor(
        errors, dtype=torch.float64
    )


def reductions(errors: torch.Tensor) -> torch.Tensor:
    """[engines, 4], as in `COLUMNS`, from norms [matrices, 1 + engines, 2]."""
    totals = torch.stack([errors[..., 0].sum(0), errors[..., 1].norm(dim=0)], dim=1)
    return 100 * (1 - torch.cat([totals / totals[0], (errors / errors[:, :1]).mean(0)], dim=1)[1:])


def groups(options: argparse.Namespace) -> Iterator[tuple[str, list[torch.Tensor]]]:
    if not options.weights:
        for rows, columns in (map(int, shape.split("x")) for shape in options.shapes.split(",")):
            yield f"{rows}x{columns}", [constructed(rows, columns, "language", torch.bfloat16)]
        return
    checkpoint = Checkpoint.open(options.weights)
    names = [name for name, info in checkpoint.tensors.items() if len(info.shape) == 2]
    matrices = [
        checkpoint.read(name) for name in names if not any(word in name for word in NOT_LINEAR)
    ]
    yield "/".join(options.weights.rstrip("/").split("/")[-2:]), matrices


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="2048x2048")
    parser.add_argument("--ranks", default="16,64,128")
    parser.add_argument("--weights", help="a checkpoint folder, in place of constructed matrices")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--lapack-repeats", type=int, default=1, help="runs of the authors' procedure, 1 or more"
    )
    parser.add_argument(
        "--no-nuclear", dest="nuclear", action="store_false", help="the Frobenius norm alone"
    )
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    heads = " ".join(f"{column:>14}" for column in COLUMNS)
    print(
        f"{'matrix':26} {'rank':>4} {'matrices':>8}  {'engine':18} {'seconds':>8} {'of authors':>10} {heads}"
    )
    for group, weights in groups(options):
        for rank in map(int, options.ranks.split(",")):
            fitting = [
                weight.to(options.device) for weight in weights if 4 * rank <= min(weight.shape)
            ]
            start = f"{group:26} {rank:4} {f'{len(fitting)}/{len(weights)}':>8}  "
            if not fitting:
                print(f"{start}left out: above a quarter of every matrix's smaller side")
                continue
            times, errors = zip(
                *(measured(weight, rank, options) for weight in fitting), strict=True
            )
            total = {engine: sum(each[engine] for each in times) for engine in times[0]}
            for (engine, taken), saved in zip(
                total.items(), reductions(torch.stack(errors)).tolist(), strict=True
            ):
                ratio = taken / total["authors qpissa T=5"]
                row = {
                    "matrix": group,
                    "rank": rank,
                    "matrices": len(fitting),
                    "engine": engine,
                    "seconds": taken,
                }
                figures = {
                    name: value
                    for name, value in zip(COLUMNS, saved, strict=True)
                    if not math.isnan(value)
                }
                rows.append({**row, "of authors": ratio, **figures})
                print(
                    f"{start}{engine:18} {taken:8.3f} {ratio:10.4f}",
                    *(f"{v:14.2f}" for v in saved),
                    flush=True,
                )
    print(json.dumps({"threads": torch.get_num_threads(), "device": options.device, "rows": rows}))


if __name__ == "__main__":
    main()
