"""One training step on a model without values: which memory it would take, tensor by tensor.

The forward and the backward pass really run, on the meta device. Every tensor that torch would
allocate is counted when it is born and taken off when Python or autograd lets it go, so the peak
knows of gradient checkpointing, dropout, float32 norms and whatever else an architecture does,
without a formula for it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface

from pissa.planning.model import NO_DEVICE, Planned
from pissa.untyped import Context

ATTENTION = "pissa_plan"
TILE_ROWS, TILE_COLUMNS = 4096, 32768
"""Positions and words of the vocabulary that TRL's fused output layer scores at a time."""
WIDE_TILES = {"cpu": 6, "cuda": 0}
"""Float32 copies of such a tile beside it: torch's own operations on a CPU, one kernel on a GPU."""
_SCALAR = torch.ops.aten._local_scalar_dense.default

logger = logging.getLogger(__name__)


def step_bytes(
    planned: Planned, rows: int, length: int, *, checkpointing: bool, accumulates: bool, kind: str
) -> int:
    """The most memory that a step takes beside weights, adapters and optimiser: activations and
    gradients.

    Args:
        planned: the model; gradients are left on it.
        rows: of a forward pass.
        length: tokens of each row.
        checkpointing: whether activations are computed again in the backward pass.
        accumulates: whether gradients of earlier passes are there already.
        kind: of device, cpu or cuda.
    """
    model, base = planned.model, planned.base
    _use_fused_attention(base)
    if checkpointing:
        # Its name in newer versions of transformers first.
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        if planned.recipe is not None:
            base.enable_input_require_grads()
    counter = _Counter([*model.parameters(), *model.buffers()])
    with counter:
        for parameter in planned.trained:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        ids = torch.zeros(rows, length, dtype=torch.long, device=NO_DEVICE)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            torch.autograd.backward(_loss(base, inputs, kind))
        except NotImplementedError:  # the model looks at values, which there are none of
            logger.warning(
                "%s cannot be tried without weights: activations by a rule of thumb",
                type(base).__name__,
            )
            trained = sum(parameter.numel() * parameter.itemsize for parameter in planned.trained)
            return trained + _rule_of_thumb(base.config, rows, length, base.dtype.itemsize)
    return counter.peak


def _rule_of_thumb(config: Any, rows: int, length: int, itemsize: int) -> int:
    """What a layer keeps for the backward pass, attention's matrices with it (arXiv 2205.05198, equation 1)."""
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    return int(itemsize * layers * rows * length * (17 * hidden + 2.5 * heads * length))


def _loss(base: Any, inputs: dict[str, Tensor], kind: str) -> Tensor:
    rows = inputs["input_ids"].shape[0]
    head = base.get_output_embeddings()
    if head is None:
        scores = base.config.num_labels == 1  # regression's labels are numbers, a class is an index
        labels = torch.zeros(rows, dtype=torch.float32 if scores else torch.long, device=NO_DEVICE)
        loss: Tensor = base(**inputs, labels=labels).loss
        return loss
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
    losses: Callable[..., Tensor] = _FusedHead.apply
    return losses(hidden[:, :-1].flatten(0, 1), head.weight, WIDE_TILES[kind]).sum()


class _FusedHead(torch.autograd.Function):
    """What TRL's output layer allocates: a tile of logits at a time, and gradients summed in float32."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, wide: int) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.wide = wide
        _tile(hidden, weight, wide)
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        sums = [
            torch.empty_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        _tile(hidden, weight, ctx.wide)
        return *(None if part is None else part.to(hidden.dtype) for part in sums), None


def _tile(hidden: Tensor, weight: Tensor, wide: int) -> list[Tensor]:
    rows, columns = min(hidden.shape[0], TILE_ROWS), min(weight.shape[0], TILE_COLUMNS)
    # So wide for any vocabulary
    logits = torch.empty(rows, TILE_COLUMNS, dtype=hidden.dtype, device=NO_DEVICE)
    return [logits, *(torch.empty(rows, columns, device=NO_DEVICE) for _ in range(wide))]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention that does not keep its matrix, as every kernel behind sdpa and flash attention."""
    output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return output.transpose(1, 2).contiguous(), None


def _use_fused_attention(base: Any) -> None:
    # Without values torch would take the slow form of sdpa, which keeps the matrix.
    if getattr(base.config, "_attn_implementation", None) not in ("sdpa", ATTENTION):
        return
    AttentionInterface.register(ATTENTION, _attention)
    talk = logging.getLogger("transformers.modeling_utils")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        base.set_attn_implementation(ATTENTION)
    finally:
        talk.setLevel(level)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors alive that were not there before, and the most there were at a time."""

    def __init__(self, present: Iterable[Tensor]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in present:
            self._born(tensor.untyped_storage())
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is _SCALAR and args[0].is_meta:
            # Masks are looked at to see whether anything is masked: no padding, one sequence a row.
            return torch.ones((), dtype=args[0].dtype).item()
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, partial(self._gone, key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int, _: Any) -> None:
        if self._alive.pop(key, None) is not None:
            self.now -= size
