"""What trains while it is spread over several processes, by FSDP2 or by DeepSpeed's ZeRO-3, and
whole again.

All processes call these together: each lends its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pissa.errors import require


def whole(tensor: Tensor) -> Tensor:
    """FSDP2's shards put together; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_away(tensor: Tensor) -> bool:
    """Whether this is what ZeRO-3 leaves in a parameter's place: DeepSpeed saves and loads its shards by itself."""
    return tensor.numel() == 0


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every process, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """What trains, whole in its own place to be read, where ZeRO-3 spread it."""
    parameters = [
        part for part in model.parameters() if part.requires_grad and hasattr(part, "ds_id")
    ]
    if not parameters:
        yield
        return
    with require("deepspeed", "deepspeed").zero.GatheredParameters(parameters):
        yield


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of what trains, whole and on the CPU; started adapters as their plain LoRA.

    A factor that does not train is none of the parameters, but a part of that LoRA.
    """
    parameters = dict(model.named_parameters())
    names = {name for name, part in parameters.items() if part.requires_grad}
    with gathered(model):
        state = model.state_dict()
        names |= {name for name in state if ".lora_" in name and name not in parameters}
        return {name: whole(state[name]).detach().cpu().clone() for name in state if name in names}


def load_trained_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a state dict of `trained_state` into a model that may be sharded by FSDP2."""
    parameters = dict(model.named_parameters())
    # A started adapter's pair is of another shape: its layer takes it apart and spreads it.
    ready = {
        name: spread(tensor, parameters[name])
        if name in parameters and tensor.shape == parameters[name].shape
        else tensor
        for name, tensor in state.items()
    }
    model.load_state_dict(ready, strict=False)
