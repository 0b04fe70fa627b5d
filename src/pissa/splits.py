"""The one shape behind every method: a weight split into a frozen part and a low-rank trainable
one.

    W [out, in]  =  frozen [out, in]  +  scale * left [out, k] @ core [k, k] @ right [k, in]

`core` is absent (the identity) for all LoRA-shaped methods. Where it is there, it trains and
`right` does not; it may be held to a pattern of entries, the others staying what they are. What
follows from a split (rebuilding, the change since the start, the export to a plain LoRA) is written
here once and holds for every method.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.errors import InputError


@dataclass(frozen=True, eq=False)
class Lora:
    """A change of one weight as a plain LoRA pair with the scale folded in: ``delta = B @ A``.

    Attributes:
        A: [k, in].
        B: [out, k].
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Columns of B, which bound the rank of the change."""
        return self.A.shape[0]

    def delta(self) -> Tensor:
        """The change itself, [out, in], in the dtype of the factors."""
        return self.B @ self.A

    def padded(self, rank: int) -> Lora:
        """The same change at a larger nominal rank (zero rows and columns), for engines that want one rank."""
        extra = rank - self.rank
        if extra < 0:
            raise InputError(
                f"cannot pad a rank-{self.rank} LoRA to rank {rank}: choose at least {self.rank}"
            )
        return Lora(
            torch.cat([self.A, self.A.new_zeros(extra, self.A.shape[1])]),
            torch.cat([self.B, self.B.new_zeros(self.B.shape[0], extra)], dim=1),
        )

    def truncated(self, rank: int) -> tuple[Lora, float]:
        """The best rank-`rank` approximation (Eckart-Young) and its error relative to the change.

        Works on the thin factors (QR of each, SVD of the small core) in float64; [out, in] is never
        formed.

        Returns:
            The pair, in the dtype of the factors, and ``|delta - best| / |delta|`` (Frobenius; 0
            for a zero change).
        """
        if rank < 1:
            raise InputError(f"rank {rank} is below 1: choose a rank from 1 to {self.rank}")
        left_basis, left_small = torch.linalg.qr(self.B.double())
        right_basis, right_small = torch.linalg.qr(self.A.double().T)
        U, S, Vh = torch.linalg.svd(left_small @ right_small.T, full_matrices=False)
        total = S.square().sum()
        error = float((S[rank:].square().sum() / total).sqrt()) if total > 0 else 0.0
        root = S[:rank].sqrt()
        best = Lora(
            (root[:, None] * (Vh[:rank] @ right_basis.T)).to(self.A.dtype),
            ((left_basis @ U[:, :rank]) * root).to(self.B.dtype),
        )
        return best, error


@dataclass(frozen=True, eq=False)
class Factors:
    """The parts of a low-rank product, or their drift since the start.

    Attributes:
        left: [out, k]; None for a drift of a part that does not train.
        right: [k, in]; None likewise.
        core: [k, k] or, along a pattern, the values [n] of its entries. None for the identity, and
            for a start's core that is zero.
        pattern: rows and columns [2, n] of the entries of the core that train; None for all.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    core: Tensor | None = None
    pattern: Tensor | None = None

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """(left, right).

        Raises:
            ValueError: one of them is not there, as in the drift of a core.
        """
        if self.left is None or self.right is None:
            raise ValueError(
                f"these factors have no pair, only {', '.join(self.named()) or 'nothing'}"
            )
        return self.left, self.right

    def named(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        parts = {"left": self.left, "right": self.right, "core": self.core, "pattern": self.pattern}
        return {name: part for name, part in parts.items() if part is not None}

    def to(self, dtype: torch.dtype) -> Factors:
        """All parts but the pattern in another dtype."""
        return Factors(
            **{
                name: part if name == "pattern" else part.to(dtype)
                for name, part in self.named().items()
            }
        )

    def on(self, device: torch.device) -> Factors:
        """All parts on a device."""
        return Factors(**{name: part.to(device) for name, part in self.named().items()})


def whole_core(values: Tensor, pattern: Tensor | None, rank: int) -> Tensor:
    """A core [k, k] from its values along a pattern; values of a whole core as they are.

    Args:
        values: [n], or [k, k] without a pattern.
        pattern: [2, n].
        rank: k.
    """
    if pattern is None:
        return values
    return values.new_zeros(rank, rank).index_put((pattern[0], pattern[1]), values.flatten())


def drift_as_pair(start: Factors, drift: Factors) -> Lora:
    """The change of a trained split as a pair, unscaled, from which the drift can be told again.

        (L + dL)(R + dR) - L R        =  [L + dL, dL] @ [dR; R]
        (L + dL)(C + dC) R - L C R    =  [L + dL, dL] @ [dC R; C R]
        (L + dL) dC R                 =  (L + dL) @ (dC R)          where C is zero, or dL is

    Its rank depends on which parts there are, never on their values.

    Args:
        start: the factors at the start.
        drift: their change since; None for what does not train.
    """
    left, right = start.pair
    moved = left if drift.left is None else left + drift.left
    if drift.core is None:
        drift_left, drift_right = drift.pair
        return Lora(torch.cat([drift_right, right]), torch.cat([moved, drift_left], dim=1))
    read = whole_core(drift.core, start.pattern, right.shape[0]) @ right
    if drift.left is None or start.core is None:
        return Lora(read, moved)
    return Lora(torch.cat([read, start.core @ right]), torch.cat([moved, drift.left], dim=1))


def drift_as_lora(start: Factors, drift: Factors, scale: float = 1.0) -> Lora:
    """The change of a trained split as the smallest plain LoRA, its error relative to the change.

        (L + dL)(R + dR) - L R          =  [L + dL, dL] @ [dR; R]
        (L + dL)(C + dC) R - L C R      =  ((L + dL) dC + dL C) @ R

    The usual form ``[L', -L] @ [R'; R]`` is a difference of two large products and loses the change
    to rounding when it is stored in 16 bits. A start with a zero factor (LoRA) and one with a core
    need only their own rank k, others 2k.

    Args:
        start: the factors at the start.
        drift: their change since; None for what does not train.
        scale: alpha / rank; folded into B.
    """
    left, right = start.pair
    if drift.core is not None:
        moved = left if drift.left is None else left + drift.left
        B = moved @ whole_core(drift.core, start.pattern, right.shape[0])
        if drift.left is not None and start.core is not None:
            B = B + drift.left @ start.core
        return Lora(right, scale * B)
    drift_left, drift_right = drift.pair
    if not left.any():
        return Lora(right + drift_right, scale * drift_left)
    if not right.any():
        return Lora(drift_right, scale * (left + drift_left))
    pair = drift_as_pair(start, drift)
    return Lora(pair.A, scale * pair.B)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, in one pass without a mask."""
    return tensor.numel() == 0 or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


@dataclass(frozen=True, eq=False)
class Quantised:
    """A matrix in few bits.

    Attributes:
        parts: what files hold, by their names in the module ("weight", "weight.absmax").
        dense: [out, in], what a loader of these parts computes with, in the dtype it unpacks them
            in.
    """

    parts: dict[str, Tensor]
    dense: Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """One weight at the start of training, ``W = frozen + scale * left @ core @ right``.

    Attributes:
        weight: W [out, in], in its own dtype.
        left: [out, k], float32 (float64 for a float64 weight), as all that is computed from the
            split.
        right: [k, in], same dtype.
        core: [k, k], or None for the identity.
        pattern: [2, n], rows and columns of the entries of the core that train; None for all.
        scale: alpha / rank, the factor an adapter's product carries.
        quantised: the frozen part in few bits; then W is only nearly the sum.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    core: Tensor | None = None
    scale: float = 1.0
    pattern: Tensor | None = None
    quantised: Quantised | None = None

    @property
    def rank(self) -> int:
        """k, the inner dimension."""
        return self.right.shape[0]

    @property
    def left_core(self) -> Tensor:
        """``left @ core``, [out, k]."""
        return self.left if self.core is None else self.left @ self.core

    @property
    def frozen(self) -> Tensor:
        """What does not train, [out, in]: quantised, or by difference (right whatever the accuracy of the factors)."""
        if self.quantised is not None:
            return self.quantised.dense.to(self.left.dtype)
        return torch.addmm(
            self.weight.to(self.left.dtype), self.left_core, self.right, alpha=-self.scale
        )

    def product(self) -> Tensor:
        """The trainable part, ``scale * left @ core @ right``, [out, in]."""
        return self.scale * (self.left_core @ self.right)

    def rebuild(self) -> Tensor:
        """The weight the split stands for, [out, in]."""
        return torch.addmm(self.frozen, self.left_core, self.right, alpha=self.scale)

    def rounded(self, dtype: torch.dtype) -> Split:
        """The same weight around factors that are representable in `dtype`: the frozen part absorbs their rounding."""
        compute = self.left.dtype
        left, right = (factor.to(dtype).to(compute) for factor in (self.left, self.right))
        core = None if self.core is None else self.core.to(dtype).to(compute)
        return dataclasses.replace(self, left=left, right=right, core=core)

    @property
    def start(self) -> Factors:
        """What an adapter starts from; a core that is zero is left out."""
        core = self.core if self.core is not None and self.core.any() else None
        return Factors(self.left, self.right, core, self.pattern)
