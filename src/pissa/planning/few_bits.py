"""A layer in few bits that has no values: it takes the memory that bitsandbytes' layer takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pissa.checkpoint.layout import Plan
from pissa.checkpoint.targets import Target
from pissa.untyped import Context


class _Product(torch.autograd.Function):
    """``x W^T`` where W is unpacked for the product, in the forward pass and again in the backward one."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = shape, dtype
        return (x.to(dtype) @ x.new_empty(shape, dtype=dtype).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        return (
            (gradient.to(ctx.dtype) @ gradient.new_empty(ctx.shape, dtype=ctx.dtype)).to(
                gradient.dtype
            ),
            None,
            None,
        )


class FewBits(nn.Linear):
    """A linear layer on the meta device with packed codes and scales in place of its weight.

    Args:
        target: the weight.
        parts: dtype and shape of what takes its place, "weight" among them.
        bias: of the layer.
        dtype: of the products.
    """

    def __init__(self, target: Target, parts: Plan, bias: nn.Parameter | None, dtype: torch.dtype):
        rows, columns = target.matrix_shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.dtype = dtype
        self.register_parameter("bias", bias)
        for name, (kind, shape) in parts.items():
            part = torch.empty(shape, dtype=kind, device="meta")
            if name == "weight":
                self.weight = nn.Parameter(part, requires_grad=False)
            else:
                self.register_buffer(name.replace(".", "_"), part)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output."""
        multiply: Callable[..., Tensor] = _Product.apply
        product = multiply(x, (self.out_features, self.in_features), self.dtype)
        return product if self.bias is None else product + self.bias
