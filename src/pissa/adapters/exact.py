"""What of a training lies beside the plain LoRA in a checkpoint: bits that would come back from that with rounding."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pissa.adapters import plain, sharding
from pissa.adapters.forms import on_layer
from pissa.errors import CheckpointError

FILE = "cores.safetensors"


def write(model: nn.Module, checkpoint: Path, *, first: bool) -> None:
    """Write them into a checkpoint's folder, if there are any.

    Where FSDP2 spread them all processes call this, and the `first` one writes.
    """
    found = parameters(model)
    whole = {name: sharding.whole(part.detach()).cpu().contiguous() for name, part in found.items()}
    if first and whole:
        plain.save_tensors(whole, checkpoint / FILE)


def read(model: nn.Module, checkpoint: Path) -> None:
    """Put back what `write` wrote.

    Raises:
        CheckpointError: the file is not there, or is of another model.
    """
    found = parameters(model)
    if not found:
        return
    file = checkpoint / FILE
    try:
        stored = load_file(file)
        with torch.no_grad():
            for name, parameter in found.items():
                value = stored[name].to(parameter.dtype)
                parameter.copy_(sharding.spread(value, parameter))
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): go on from another checkpoint"
        ) from error


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What lies beside the pair, by name of its layer, part and adapter."""
    return {
        f"{name}.{part}.{adapter}": parameter
        for name, layer in model.named_modules()
        for adapter, form in on_layer(layer).items()
        for part, parameter in form.exact(layer, adapter).items()
    }
