"""SVFT: a sparse core between the full singular bases (arXiv 2405.19597, section 3).

    W = U S Vh,  left = U,  right = Vh,  core = 0 on a pattern,  frozen = W;     only the entries of the pattern train

plain      the diagonal
banded     |i - j| <= width
random     as many entries as banded, drawn without replacement
top_k      as many, where |u_i . v_j| is largest (square weights)

Deviations: the core starts at zero and carries no gate, so that the first step is the base exactly
and every parameter is counted; random and top_k hold the diagonal and no entry twice; top_k looks
at |U^T V|, which the authors' code misses by a transpose; W itself is never truncated. The bases
are of min(out, in) directions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import full_svd
from pissa.randomness import tensor_seed
from pissa.registry import method
from pissa.splits import Split


def count(rank: int, *, pattern: str, width: int) -> int:
    """Entries that train of a core [k, k], which is k (2 width + 1) - width (width + 1) for a band."""
    width = 0 if pattern == "plain" else min(width, rank - 1)
    return rank * (2 * width + 1) - width * (width + 1)


@method(
    "svft",
    title="SVFT",
    paper="2405.19597",
    trains="a few entries of a core between the full singular bases",
    verdict="very few parameters and a change of full rank, which no small LoRA holds: merge it; stores both bases",
    parts=("core",),
    zero_start=True,
    full_rank=True,
    entries=count,
)
def svft(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    pattern: Literal["plain", "banded", "random", "top_k"] = "plain",
    width: int = 16,
) -> Split:
    """All singular vectors, frozen, around a core of zeros with a pattern."""
    if width < 0:
        raise InputError(f"svft: width is {width}, expected 0 or more")
    full = full_svd(weight)
    missing = count(rank, pattern=pattern, width=width) - rank
    diagonal = torch.arange(rank)
    if pattern == "banded":
        rows, columns = torch.where((diagonal[:, None] - diagonal).abs() <= width)
    elif pattern == "plain":
        rows = columns = diagonal
    else:
        scores = _scores(full.U, full.Vh, pattern, tensor_seed(seed, name), name)
        extra = scores.fill_diagonal_(-1).flatten().topk(missing).indices.sort().values
        rows, columns = torch.cat([diagonal, extra // rank]), torch.cat([diagonal, extra % rank])
    entries = torch.stack([rows, columns]).to(weight.device)
    return Split(weight, full.U, full.Vh, full.S.new_zeros(rank, rank), scale, entries)


def _scores(U: Tensor, Vh: Tensor, pattern: str, seed: int, name: str) -> Tensor:
    """What decides which entries [k, k] off the diagonal are taken: the largest."""
    if pattern == "random":
        return torch.rand(
            Vh.shape[0],
            Vh.shape[0],
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
    if U.shape[0] != Vh.shape[1]:
        raise InputError(
            f"svft: top_k compares left with right singular vectors, which `{name}` [{U.shape[0]}, {Vh.shape[1]}] has "
            "of different lengths: use another pattern, or leave it out of --targets"
        )
    return (U.T @ Vh.T).abs().cpu()
