"""Updates of two factors whose joint change of their product is nearest a given change (LoRA-Pro,
arXiv 2407.18242).

For a weight ``W0 + s B A`` with gradient G the factors' own gradients are ``gB = s G A^T`` and ``gA
= s B^T G``. Updates (uB, uA) change the weight by ``g~ = s (B uA + uB A)``: a vector of the tangent
space, at ``B A``, of the matrices of rank r. The paper minimises ``|g~ - G|``, which leaves a
matrix X free, and takes the X with the least ``|uB - gB|^2 + |uA - gA|^2``, the solution of a
Sylvester equation. That is also the minimiser of least norm, and in the eigenbases of the two Gram
matrices, ``B^T B = P diag(l) P^T`` and ``A A^T = Q diag(u) Q^T``, it takes one line a factor:

    K = P^T B^T gB Q / (l + u),    uA = P (P^T gA - K Q^T A) / l / s^2,    uB = (gB Q - B P K) / u Q^T / s^2

What both factors could write is shared between them as l to u; ``g~ = P_B G + (I - P_B) G P_A``. G
is never needed, nor any [out, in]. Directions that a factor lacks get nothing from it, so ``B = 0``
is no special case: B alone moves.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Tangent:
    """The changes that two factors can make of their product, to first order.

    Args:
        left: B [out, r], float32 or float64.
        right: A [r, in], same dtype.
        scale: s, alpha / rank.
        damping: of ``damping * s^2 (mean l + mean u) (|uB|^2 + |uA|^2)`` added to what is
            minimised; 0 for none.
    """

    def __init__(self, left: Tensor, right: Tensor, scale: float = 1.0, damping: float = 0.0):
        self.left, self.right, self.scale = left, right, scale
        self._l, self._P = torch.linalg.eigh(left.T @ left)
        self._u, self._Q = torch.linalg.eigh(right @ right.T)
        self._ridge = damping * (self._l.mean() + self._u.mean())

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(gB [out, r], gA [r, in]) of a gradient [out, in] of the weight."""
        return self.scale * (gradient @ self.right.T), self.scale * (self.left.T @ gradient)

    def updates(self, gradient_left: Tensor, gradient_right: Tensor) -> tuple[Tensor, Tensor]:
        """(uB [out, r], uA [r, in]), to be subtracted like gradients, from (gB, gA)."""
        l, u = self._l + self._ridge, self._u + self._ridge  # noqa: E741 the docstring's letter
        B, A, gB, gA = (
            self.left @ self._P,
            self._Q.T @ self.right,
            gradient_left @ self._Q,
            self._P.T @ gradient_right,
        )
        K = (B.T @ gB) * _inverse(l[:, None] + self._u)
        update_left, update_right = (gB - B @ K) * _inverse(u), (gA - K @ A) * _inverse(l)[:, None]
        return update_left @ self._Q.T / self.scale**2, self._P @ update_right / self.scale**2

    def change(self, update_left: Tensor, update_right: Tensor) -> Tensor:
        """What updates change of the weight, ``s (B uA + uB A)``, [out, in]."""
        return torch.addmm(self.left @ update_right, update_left, self.right).mul_(self.scale)


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 for those that are nothing but the rounding of the largest."""
    floor = len(values) * torch.finfo(values.dtype).eps * values.max()
    return torch.where(values > floor, 1 / values, 0.0)
