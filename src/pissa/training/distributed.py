"""One run in several processes, as `accelerate launch` and `torchrun` start them: DDP, FSDP2,
DeepSpeed's ZeRO-3.

Every process checks everything and loads the base whole from disk. The first one makes the start,
writes it to the run's `state/`, and the others read it from there: all begin with the same bits,
and no SVD sees a sharded weight. Only the first one writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file

from pissa import errors
from pissa.adapters.plain import WEIGHTS
from pissa.adapters.sharding import load_trained_state, trained_state
from pissa.config import TrainSettings, config_error
from pissa.errors import ConfigError, OutputError, PissaError, require

Result = TypeVar("Result")
_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
logger = logging.getLogger(__name__)


def processes() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return processes() == 1 or int(os.environ["RANK"]) == 0


def layout() -> dict[str, Any]:
    """What must be the same on resuming: how many processes, and what is spread over them."""
    if processes() == 1:
        return {"count": 1, "sharding": "none"}
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "deepspeed"),
        ("ACCELERATE_USE_FSDP", "fsdp"),
    ):
        if os.environ.get(variable, "false").lower() == "true":
            return {"count": processes(), "sharding": name}
    return {"count": processes(), "sharding": "ddp"}


def join(settings: TrainSettings, device: str) -> TrainSettings:
    """Meet the other processes, before anything is written.

    Args:
        settings: of the run. Where they do not give micro_batch_size, it becomes the largest that
            divides the rows of a step evenly among the processes.
        device: cpu or cuda.

    Raises:
        ConfigError: batch_size cannot be dealt out, or FSDP of another version than 2.
    """
    count = processes()
    if count == 1:
        return settings
    if "micro_batch_size" not in settings.model_fields_set and settings.batch_size % count == 0:
        share = settings.batch_size // count
        largest = max(size for size in range(1, 9) if share % size == 0)
        settings = settings.model_copy(update={"micro_batch_size": largest})
    if settings.batch_size % (settings.micro_batch_size * count):
        raise ConfigError(
            f"batch_size: got {settings.batch_size} rows a step for {count} processes of micro_batch_size "
            f"{settings.micro_batch_size}, expected a multiple of {settings.micro_batch_size * count}"
        )
    if layout()["sharding"] == "fsdp":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError(
                "fsdp_version: got 1, expected 2 in the file of accelerate: frozen parts need FSDP2"
            )
        if os.environ.get(_RAM_EFFICIENT, "false").lower() == "true":
            # Processes beyond the first would hold empty weights, of which no start can be made or
            # checked.
            os.environ[_RAM_EFFICIENT] = "false"
            if is_first():
                logger.warning(
                    "fsdp_cpu_ram_efficient_loading is off: every process loads the base, and checks it"
                )
    if not dist.is_initialized():
        PartialState(cpu=device == "cpu")
    return settings


def check_same_layout(before: dict[str, Any], out: Path) -> None:
    """A run goes on in as many processes as it began in, sharded alike: else its numbers would
    differ.

    Raises:
        ConfigError: naming what differs.
    """
    old, now = before.get("processes", {"count": 1, "sharding": "none"}), layout()
    mistakes = [
        f"{key}: got {now[key]}, expected {old[key]} as the run began"
        for key in now
        if now[key] != old[key]
    ]
    if mistakes:
        raise config_error(mistakes, f"the processes to resume {out} with")


def wait() -> None:
    """Until every process is here, however long the slowest takes."""
    if processes() > 1:
        dist.barrier(_patient_group())


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises on the first process, on all of them; the others wait."""
    if processes() == 1:
        return work()
    if is_first():
        try:
            result = work()
        except Exception as error:
            _tell([None, _told(error)])
            raise
        _tell([result, None])
    else:
        result = _hear()
    return result


@contextmanager
def first_ahead(out: Path) -> Iterator[None]:
    """The first process goes through the block alone, then the others do; if it fails there, all
    stop.

    Args:
        out: a folder that the first one makes in the block.

    Raises:
        OutputError: another one does not see the folder.
    """
    if processes() == 1:
        yield
        return
    if is_first():
        try:
            yield
        except Exception as error:
            _tell([None, _told(error)])
            raise
        _tell([None, None])
    else:
        _hear()
        if not out.is_dir():
            raise OutputError(
                f"process {os.environ['RANK']} does not see {out}, which the first process made: choose a folder on a "
                "file system that all machines share"
            )
        yield
    wait()


def adapt(trainer: Any) -> None:
    """Let a trainer of transformers save and load what trains, whole, where it is spread over
    processes.

    By itself it gathers the frozen base for every checkpoint, and with ZeRO-3 writes the drift as
    if it were a LoRA.
    """
    sharding = layout()["sharding"]
    if sharding in ("fsdp", "deepspeed") and isinstance(trainer.model, PeftModel):
        trainer.save_model = lambda output_dir=None, _internal_call=False: _save_model(
            trainer, output_dir
        )
    if sharding == "fsdp" and isinstance(trainer.model, PeftModel):
        trainer._load_from_checkpoint = lambda folder, model=None: _load_checkpoint(
            trainer.model, Path(folder)
        )


def _save_model(trainer: Any, folder: str | None) -> None:
    state = trained_state(trainer.model)
    if is_first():
        trainer._save(folder or trainer.args.output_dir, state_dict=state)


def _load_checkpoint(model: PeftModel, folder: Path) -> None:
    """Read a checkpoint's adapter file, under the names that the model's own state dict has."""
    adapter = model.active_adapter
    names = {
        name.replace(f".{adapter}", "").replace(".modules_to_save", ""): name
        for name, part in model.named_parameters()
        if part.requires_grad
    }
    tensors = load_file(folder / WEIGHTS)
    # A frozen factor beside a core is no parameter, but its layer knows it by the same name.
    own = {name: names.get(name, name.replace(".weight", f".{adapter}.weight")) for name in tensors}
    load_trained_state(model, {own[name]: tensor for name, tensor in tensors.items()})


def partition(trainer: Any) -> None:
    """Spread a whole model over the processes, parameter by parameter, before DeepSpeed would move it to each GPU."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin and plugin.zero_stage == 3:
        zero = require("deepspeed", "deepspeed").zero
        zero.Init(module=trainer.model, config_dict_or_path=plugin.hf_ds_config.config)


@cache
def _patient_group() -> Any:
    """Processes that wait for a decomposition wait for hours; NCCL would give up after ten minutes."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


def _tell(outcome: list[Any]) -> None:
    dist.broadcast_object_list(outcome, src=0, group=_patient_group())


def _hear() -> Any:
    """What the first process has come to, or its error."""
    outcome: list[Any] = [None, None]
    dist.broadcast_object_list(outcome, src=0, group=_patient_group())
    value, failure = outcome
    if failure:
        kind, message = failure
        raise getattr(errors, kind, PissaError)(message)
    return value


def _told(error: Exception) -> tuple[str, str]:
    """An error as the other processes hear of it: its kind and its message."""
    known = isinstance(error, PissaError)
    return type(error).__name__, str(
        error
    ) if known else f"the first process stopped: {type(error).__name__}: {error}"
