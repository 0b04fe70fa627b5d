"""A linear layer that computes in 4 bits, weights and activations, and its low-rank branch, in one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pissa.errors import InputError
from pissa.linalg.int4 import GROUP, Int4, product, quantise, unpack
from pissa.splits import Lora, Split


class W4A4Linear(nn.Module):
    """``y = Q(R) Q(x / smooth) + left (right x) + bias`` (SVDQuant, arXiv 2411.05007, equation 6).

    The quantised product is that of the stored integers and scales, see `pissa.linalg.int4`;
    activations are quantised at every call, each token by itself. Sums are in float32, the result
    in the dtype of x. Time is not what it is for: without a kernel for 4-bit integers it is slower
    than the layer it takes the place of.

    Buffers, all that a state dict holds:
        codes: uint8 [out, ceil(in / 2)].
        scales: float16 [out, ceil(in / 64)].
        smooth: float16 [in].
        left, right: float16 [out, r], [r, in].
        bias: [out] in the model's dtype, or None.

    Args:
        in_features: in.
        out_features: out.
        rank: r, 0 or more.
        bias: in the place of the bias of the layer before.
        device: of the empty buffers.
    """

    codes: Tensor
    scales: Tensor
    smooth: Tensor
    left: Tensor
    right: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        half = {"dtype": torch.float16, "device": device}
        packed, groups = -(-in_features // 2), -(-in_features // GROUP)
        self.register_buffer(
            "codes", torch.empty(out_features, packed, dtype=torch.uint8, device=device)
        )
        self.register_buffer("scales", torch.empty(out_features, groups, **half))  # type: ignore[arg-type]
        self.register_buffer("smooth", torch.empty(in_features, **half))  # type: ignore[arg-type]
        self.register_buffer("left", torch.empty(out_features, rank, **half))  # type: ignore[arg-type]
        self.register_buffer("right", torch.empty(rank, in_features, **half))  # type: ignore[arg-type]
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_split(cls, split: Split, bias: Tensor | None = None) -> W4A4Linear:
        """The layer of a split by the method svdquant.

        Args:
            split: as the method returns it.
            bias: [out], kept as it is.
        """
        if split.quantised is None:
            raise InputError("this split has nothing in 4 bits: make it with the method svdquant")
        rows, columns = split.weight.shape
        layer = cls(columns, rows, split.rank, bias, split.weight.device)
        factors = {"left": split.scale * split.left, "right": split.right}
        for name, tensor in {**split.quantised.parts, **factors}.items():
            getattr(layer, name).copy_(tensor)
        return layer

    @property
    def rank(self) -> int:
        """Of the branch."""
        return len(self.right)

    @property
    def rest(self) -> Int4:
        """Q(R), which meets x / smooth."""
        if self.scales.dtype != torch.float16:
            raise InputError(
                f"the scales of a 4-bit layer were cast to {self.scales.dtype}, expected torch.float16: load the model "
                "again and leave its dtype alone (model.to(device) is fine)"
            )
        return Int4(unpack(self.codes, self.in_features), self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., in] the output [..., out], in its dtype."""
        rows = x.reshape(-1, self.in_features).float()
        y = product(quantise(rows / self.smooth.float()), self.rest)
        y = y.addmm_(rows @ self.right.float().T, self.left.float().T)
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """The weight that the layer stands for where activations are not quantised, float32 [out, in]."""
        return self.rest.dense() / self.smooth.float() + self.left.float() @ self.right.float()

    def with_lora(self, lora: Lora) -> W4A4Linear:
        """The layer with a plain LoRA beside its branch: factors stacked, rounded to float16, codes as they are."""
        layer = W4A4Linear(
            self.in_features, self.out_features, self.rank + lora.rank, self.bias, self.codes.device
        )
        stacked = {
            "left": torch.cat([self.left, lora.B.half()], 1),
            "right": torch.cat([self.right, lora.A.half()]),
        }
        layer.load_state_dict({**self.state_dict(), **stacked})
        return layer

    def extra_repr(self) -> str:
        """Shapes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
