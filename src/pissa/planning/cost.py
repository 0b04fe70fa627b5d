"""What a method costs: memory on the device and on the host, and room on the disk.

    device   weights + adapters + starts + optimiser + gradients + activations, at the fullest moment of a step
    host     the process + the larger of loading (the whole model, before it goes to a GPU) and of splitting
    disk     adapter + state + residual + checkpoints; the model and checkpoints for full

Weights, adapters and starts are the tensors of the model itself (`model.py`), 4-bit ones with their
scales. AdamW keeps two numbers a trained one, in its dtype. Gradients and activations are those of
a step that is tried (`step.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pissa.checkpoint.layout import plan_bytes
from pissa.config import TrainSettings
from pissa.method import brought
from pissa.planning.model import Planned
from pissa.planning.step import step_bytes
from pissa.quant import Quantiser
from pissa.surgery.pipeline import MOST_WORKERS, WAITING

FLOAT = 4
"""Bytes of a factor: adapters train, and are saved, in float32."""
SPLIT_COPIES = 4
"""Float32 matrices of a weight's size that splitting holds: it, its rest, what the codes stand for, a spare."""


@dataclass(frozen=True)
class Device:
    """Bytes on the device at the fullest moment; they add up."""

    weights: int
    adapters: int
    starts: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Host:
    """Bytes of main memory: libraries and the like, loading the model, splitting weights, originals under residuals."""

    process: int
    loading: int
    splitting: int
    originals: int

    @property
    def total(self) -> int:
        """At the fullest moment before training."""
        return self.process + max(self.loading + self.originals, self.splitting)


@dataclass(frozen=True)
class Disk:
    """Bytes in the run's folder: what it leaves, and the checkpoints (one more than are kept, while it is written)."""

    result: int
    residual: int
    checkpoint: int
    checkpoints: int

    @property
    def total(self) -> int:
        """At the fullest moment."""
        return self.result + self.residual + self.checkpoint * self.checkpoints


def device_cost(planned: Planned, settings: TrainSettings, length: int, kind: str) -> Device:
    """Memory on the device; takes a step on the model, so it comes last.

    Args:
        planned: the model.
        settings: of the run.
        length: tokens of a row.
        kind: cpu or cuda.
    """
    trained = planned.trained
    gradients, start_bytes = _bytes(trained), _start_bytes(planned)
    everything = _bytes([*planned.model.parameters(), *planned.model.buffers()])
    adapters = 0 if planned.recipe is None else gradients
    # Under autocast the backward pass needs the weights in bfloat16 beside those in float32.
    copies = sum(
        2 * p.numel()
        for p in planned.model.parameters()
        if settings.bf16 and p.dtype == torch.float32
    )
    working = step_bytes(
        planned,
        settings.micro_batch_size,
        length,
        checkpointing=settings.gradient_checkpointing,
        accumulates=settings.batch_size > settings.micro_batch_size,
        kind=kind,
    )
    return Device(
        weights=everything - adapters - start_bytes,
        adapters=adapters,
        starts=start_bytes,
        optimizer=_optimizer_bytes(planned),
        gradients=gradients,
        activations=max(working - gradients, 0) + copies,
    )


def host_cost(planned: Planned, device: Device, kind: str, process: int) -> Host:
    """Main memory before training begins; on a CPU the model stays there and `device` counts it
    already.

    Args:
        planned: the model.
        device: its cost there.
        kind: cpu or cuda.
        process: bytes of the process without a model.
    """
    widest = max((math.prod(target.shape) for target in planned.targets), default=0)
    workers = min(torch.get_num_threads(), MOST_WORKERS)
    splitting = (workers * SPLIT_COPIES + WAITING) * FLOAT * widest if planned.makes_residual else 0
    # bitsandbytes puts its layers on the GPU as it reads them; everything else is loaded on the CPU
    # first.
    loading = (
        0 if planned.packed and kind != "cpu" else device.weights + device.adapters + device.starts
    )
    originals = 0
    if planned.adaptation:
        sizes = sum(math.prod(target.shape) for target in planned.targets)
        form = planned.adaptation.form
        originals = form.original_bytes(planned.source.dtype.itemsize * sizes)
    return Host(process, loading, splitting, originals)


def disk_cost(planned: Planned, settings: TrainSettings, steps: int | None) -> Disk:
    """Room for the run's folder; JSON files and the tokenizer, some hundred kilobytes to megabytes, are left out."""
    trained = _bytes(planned.trained)
    adaptation, residual = planned.adaptation, 0
    if adaptation is None:
        result = exported = _bytes(planned.model.parameters())
    else:
        named = planned.model.named_parameters()
        own = _bytes(part for name, part in named if part.requires_grad and ".lora_" in name)
        ranks = adaptation.recipe.rank_of
        rank_bytes = FLOAT * sum(ranks(t.module) * sum(t.matrix_shape) for t in planned.targets)
        exported = adaptation.form.export_ranks * rank_bytes + trained - own
        result = exported + _start_bytes(planned) + trained
        if planned.makes_residual:
            residual = _residual_bytes(planned, adaptation.quantizer, rank_bytes)
    saves = 1 if not settings.save_steps or not steps else math.ceil(steps / settings.save_steps)
    if settings.save_steps and settings.save_total_limit:
        most = settings.save_total_limit + 1
        saves = most if steps is None else min(saves, most)
    return Disk(result, residual, exported + _optimizer_bytes(planned), saves)


def _start_bytes(planned: Planned) -> int:
    """What adapters keep of their starts."""
    return _bytes(tensor for name, tensor in planned.model.named_buffers() if ".start_" in name)


def _optimizer_bytes(planned: Planned) -> int:
    """Two moments of all that trains; a method's own optimizer may keep others of the weights themselves."""
    adaptation = planned.adaptation
    own = adaptation.method.optimizer if adaptation else None
    numbers_kept: Callable[..., int] | None = (
        getattr(brought(own), "numbers_kept", None) if own else None
    )
    if adaptation is None or numbers_kept is None:
        return 2 * _bytes(planned.trained)
    named = planned.model.named_parameters()
    others = [part for name, part in named if part.requires_grad and ".lora_" not in name]
    shapes = [target.matrix_shape for target in planned.targets]
    return FLOAT * numbers_kept(shapes, **adaptation.recipe.options) + 2 * _bytes(others)


def _residual_bytes(planned: Planned, packer: Quantiser | None, start: int) -> int:
    """Weights in few bits, the others as they were, and the start."""
    if packer is None:
        return 0
    packed = {
        target.module: target for target in planned.targets if target.module in planned.packed
    }
    codes = sum(
        plan_bytes(packer.plan(target.matrix_shape, planned.source.dtype))
        for target in packed.values()
    )
    inside = {f"{module}.weight" for module in packed}
    others = sum(count for name, count in planned.sizes.items() if name not in inside)
    return codes + start + planned.source.dtype.itemsize * others


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all tensors, one that is used twice counted once."""
    return sum(
        tensor.untyped_storage().nbytes()
        for tensor in {id(tensor): tensor for tensor in tensors}.values()
    )
