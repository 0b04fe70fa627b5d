"""What a run will take, before it begins and without loading a weight."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from pissa.checkpoint.writer import parse_bytes
from pissa.config import TrainSettings
from pissa.errors import InputError, PissaError
from pissa.planning.cost import Device, Disk, Host, device_cost, disk_cost, host_cost
from pissa.planning.counts import Counts, count, limit
from pissa.planning.machine import Machine, look
from pissa.planning.measure import Measured, measure
from pissa.planning.model import build
from pissa.planning.source import Source, open_source
from pissa.presets import Choice, choose
from pissa.training.checks import check
from pissa.untyped import Json

COMPARED = ("full", "lora", "qlora")
"""Methods beside the one that is asked for."""


@dataclass(frozen=True)
class Cost:
    """What one method takes.

    Attributes:
        method: its name.
        dtype: of the weights that are not in few bits.
        parameters: of the model.
        trainable: of those, or beside those, that train: the number that `pissa train` reports.
        device, host, disk: bytes; None with a problem.
        needs: bytes at the fullest moment of training, on a CPU with the process.
        fits: yes, tight or no; "?" with a problem.
        problem: why this method cannot run with these settings.
    """

    method: str
    dtype: str = ""
    parameters: int = 0
    trainable: int = 0
    device: Device | None = None
    host: Host | None = None
    disk: Disk | None = None
    needs: int = 0
    fits: str = "?"
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        model: its name.
        length: tokens of the longest row.
        batch_size: rows of a step.
        counts: rows, steps, tokens.
        machine: where it is to fit.
        costs: of full, lora, qlora and, last, the method that is asked for.
        measured: seconds a step and peak memory, if asked for.
    """

    model: str
    length: int
    batch_size: int
    counts: Counts
    machine: Machine
    costs: list[Cost]
    measured: Measured | None = None

    @property
    def asked(self) -> Cost:
        """The method of the settings."""
        return self.costs[-1]

    @property
    def seconds(self) -> float | None:
        """Of all steps, from those that were measured."""
        if self.measured is None or not self.counts.steps:
            return None
        return self.measured.step_seconds * self.counts.steps

    @property
    def tokens_per_second(self) -> float | None:
        """From the steps that were measured and the mean length of a row."""
        if self.measured is None or self.counts.row_tokens is None:
            return None
        return self.counts.row_tokens * self.batch_size / self.measured.step_seconds

    def to_json(self) -> Json:
        """Everything, with the sums."""
        plan = dataclasses.asdict(self)
        for written, cost in zip(plan["costs"], self.costs, strict=True):
            for key in ("device", "host", "disk"):
                part = getattr(cost, key)
                if part is not None:
                    written[key]["total"] = part.total
        return {**plan, "seconds": self.seconds, "tokens_per_second": self.tokens_per_second}


def plan(settings: TrainSettings, *, memory: str | None = None, measured: bool = False) -> Plan:
    """Trainable parameters, memory, disk, steps, and whether it fits; no weight is read unless
    `measured`.

    Args:
        settings: of the run; of the model `config.json` is enough.
        memory: of a GPU to plan for, "24GB"; None for this machine.
        measured: train a few real steps in a temporary folder, to know the time.

    Raises:
        ConfigError, InputError, DataError, CheckpointError: what training would refuse.
    """
    elsewhere = {"attn_implementation": "auto", "liger": False, "bf16": False} if memory else {}
    # Kernels of a GPU that is not here.
    choice = check(settings.model_copy(update={"device": "auto", **elsewhere}), False)
    machine = look(settings, None if memory is None else parse_bytes(memory))
    source = open_source(settings)
    counts = count(settings, source)
    others = [] if source.decomposed else [name for name in COMPARED if name != settings.method]
    costs = [_other(name, settings, source, counts, machine) for name in others]
    costs.append(_cost(settings, choice, source, counts, machine))
    if measured and (counts.rows is None or not source.tensors):
        raise InputError(
            f"--measure trains a few steps: {settings.model} and {settings.data} must be here, whole"
        )
    taken = measure(settings) if measured else None
    return Plan(
        settings.model, limit(settings, source), settings.batch_size, counts, machine, costs, taken
    )


def _other(
    method: str, settings: TrainSettings, source: Source, counts: Counts, machine: Machine
) -> Cost:
    """The cost of a method that was not asked for; one that cannot run is a line, not an error."""
    plain: Json = {
        "method": method,
        "quant": None,
        "iterations": None,
        "base": "keep",
        "dropout": 0.0,
    }
    if method != "qlora":
        plain["double_quant"] = False
    if method == "full" and source.dtype == torch.float16:
        source = dataclasses.replace(source, dtype=torch.bfloat16)
    try:
        choice = (
            None
            if method == "full"
            else choose(method, double_quant=settings.double_quant and method == "qlora")
        )
        return _cost(settings.model_copy(update=plain), choice, source, counts, machine)
    except PissaError as error:
        return Cost(method, problem=str(error).splitlines()[-1].strip())


def _cost(
    settings: TrainSettings,
    choice: Choice | None,
    source: Source,
    counts: Counts,
    machine: Machine,
) -> Cost:
    planned = build(source, settings, choice, counts.classes)
    disk = disk_cost(planned, settings, counts.steps)
    trainable = sum(parameter.numel() for parameter in planned.trained)
    device = device_cost(planned, settings, limit(settings, source), machine.kind)
    host = host_cost(planned, device, machine.kind, machine.process_bytes)
    # On a CPU all is in one place, what only lies on the host beside it too.
    needs = device.total + (host.process + host.originals if machine.kind == "cpu" else 0)
    return Cost(
        settings.method,
        str(source.dtype).removeprefix("torch."),
        sum(planned.sizes.values()),
        trainable,
        device,
        host,
        disk,
        needs,
        machine.verdict(needs, host.total),
    )
