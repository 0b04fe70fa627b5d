"""Where left/right become lora_B/lora_A: the only place that knows how peft stores a factor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pissa.checkpoint.targets import Target
from pissa.splits import Factors
from pissa.untyped import PeftLayer

Starts = Mapping[str, Factors]
"""Module path to factors."""


def parameters(layer: PeftLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """The adapter's own parameters, left and right, as peft stores them."""
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
    return layer.lora_B[adapter].weight, layer.lora_A[adapter].weight


def trained(layer: PeftLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """(left [out, r], right [r, in]): views of the adapter's own parameters as matrices."""
    left, right = parameters(layer, adapter)
    return left.flatten(1), right.flatten(1)


def assign(layer: PeftLayer, adapter: str, left: Tensor, right: Tensor) -> None:
    """Overwrite the adapter's own parameters."""
    own_left, own_right = trained(layer, adapter)
    with torch.no_grad():
        own_left.copy_(left)
        own_right.copy_(right)


def keys(layer: PeftLayer, adapter: str, prefix: str) -> tuple[str, str]:
    """The state-dict keys of (left, right)."""
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return f"{prefix}lora_embedding_B.{adapter}", f"{prefix}lora_embedding_A.{adapter}"
    return f"{prefix}lora_B.{adapter}.weight", f"{prefix}lora_A.{adapter}.weight"


def as_stored(layer: PeftLayer, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in the shapes that peft stores."""
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        return left[..., None, None], right.reshape(-1, *base.weight.shape[1:])
    return left, right


def file_keys(target: Target) -> tuple[str, str]:
    """The names of (left, right) in an adapter file."""
    prefix = f"base_model.model.{target.module}."
    if target.kind == "embedding":
        return f"{prefix}lora_embedding_B", f"{prefix}lora_embedding_A"
    return f"{prefix}lora_B.weight", f"{prefix}lora_A.weight"


def file_shapes(target: Target, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of (left, right) in an adapter file."""
    rows, columns = target.matrix_shape
    if target.kind == "conv2d":
        return (rows, rank, 1, 1), (rank, *target.shape[1:])
    return (rows, rank), (rank, columns)


def file_tensors(target: Target, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """One adapter's factors under the names and in the shapes of an adapter file."""
    key_left, key_right = file_keys(target)
    shape_left, shape_right = file_shapes(target, right.shape[0])
    return {key_right: right.reshape(shape_right), key_left: left.reshape(shape_left)}
