"""LaMDA: a core that trains, a right factor that does not, a left one that stops (arXiv
2406.12832).

    W ~ U S Vh,  left = U_r,  core = S_r / s,  right = Vh_r,  frozen = W - s left core right

The core trains to the end; the left factor's columns are closed one after another over the first
share `eta` of the steps, see `pissa.training.closing`. LaMDA++ gives more rank to layers whose
leading singular values hold less energy.

Deviations: the paper's text was not at hand; this is the spectral form that its abstract describes,
not that of the released code, which starts at random and, by a missing factor, never freezes more
than three columns. A closed column is kept from moving at all, whereas a gradient of zero leaves it
to momentum and weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pissa.errors import InputError
from pissa.linalg import frobenius, truncated_svd
from pissa.method import Allotment
from pissa.registry import method
from pissa.splits import Split

LEAST, MOST = 0.5, 2.0
"""Ranks that LaMDA++ gives, as shares of the asked one."""


def energy(weight: Tensor, observed: None, rank: int, *, eta: float) -> Tensor:
    """Share of the squared norm in the leading `rank` singular values, and the most that this layer can have."""
    top = truncated_svd(weight, rank, "fast", seed=0, name="energy")
    total = frobenius(weight.float()) ** 2
    share = float(top.S.double().square().sum()) / total if total else 1.0
    return torch.tensor([share, min(weight.shape)], dtype=torch.float64)


def by_energy(scores: dict[str, Tensor], rank: int, *, eta: float) -> dict[str, int]:
    """Ranks from half to twice the asked one that add up to it on average.

    The next one goes to the layer that misses most energy for each rank that it has.
    """
    least, budget = max(1, int(LEAST * rank)), rank * len(scores)
    most = {name: min(max(rank, int(MOST * rank)), int(score[1])) for name, score in scores.items()}
    missing = {name: 1.0 - float(score[0]) for name, score in scores.items()}
    ranks = dict.fromkeys(scores, least)
    for _ in range(budget - least * len(scores)):
        growing = [name for name in scores if ranks[name] < most[name]]
        if not growing:
            break
        ranks[max(growing, key=lambda name: (missing[name] / ranks[name], name))] += 1
    return ranks


def _split(
    weight: Tensor, rank: int, scale: float, svd: str | float, seed: int, name: str, eta: float
) -> Split:
    if not 0 < eta <= 1:
        raise InputError(f"lamda: eta is {eta}, expected a share of the steps above 0, up to 1")
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    return Split(weight, top.U, top.Vh, torch.diag(top.S / scale), scale)


@method(
    "lamda",
    title="LaMDA",
    paper="2406.12832",
    trains="an r x r core, and for the first steps the left factor",
    verdict="fewer updates than LoRA and an export of rank r; the gain in memory comes only once the left is closed",
    parts=("left", "core"),
    schedule="pissa.training.closing:CloseLeft",
)
def lamda(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    eta: float = 0.3,
) -> Split:
    """The top singular triplets with the singular values in the core; `eta` is for the training that follows."""
    return _split(weight, rank, scale, svd, seed, name, eta)


@method(
    "lamda++",
    title="LaMDA++",
    paper="2406.12832",
    trains="as lamda, with more rank where a weight's spectrum is flat",
    verdict="lamda with a rank for each layer at the same sum of ranks; experimental, its rule is not the paper's text",
    parts=("left", "core"),
    allotment=Allotment(energy, by_energy),
    schedule="pissa.training.closing:CloseLeft",
)
def lamda_plus(
    weight: Tensor,
    rank: int,
    *,
    scale: float,
    svd: str | float,
    seed: int,
    name: str,
    eta: float = 0.3,
) -> Split:
    """The same split at the layer's own rank."""
    return _split(weight, rank, scale, svd, seed, name, eta)
