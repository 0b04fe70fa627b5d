"""The `state/` folder of a run: start factors, the drift since, modules that trained whole, and the
base's fingerprint.

Beside it lies `adapter/`, the same change as a plain LoRA. No model is needed to read or write
either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pissa.adapters import plain
from pissa.adapters.adaptation import Adaptation
from pissa.adapters.factors import Starts
from pissa.checkpoint.output import read_json, write_json
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError
from pissa.records import Base, Record
from pissa.splits import Lora

STATE, RECORD = "state.safetensors", "pissa.json"


@dataclass(frozen=True)
class State:
    """A `state/` folder, read.

    Attributes:
        record: of kind "state", with a base.
        adaptation: what its recipe names.
        starts: by module.
        trained: what trains in the form of the adaptation, by module.
        extras: tensors of modules that trained whole, under peft's file names.
        shapes: the stored weight's shape by module.
    """

    record: Record
    adaptation: Adaptation
    starts: Starts
    trained: Starts
    extras: dict[str, Tensor]
    shapes: dict[str, list[int]]

    @property
    def targets(self) -> list[Target]:
        """The targets, with shapes."""
        kinds = self.adaptation.recipe.targets
        return [Target(name, kind, tuple(self.shapes[name])) for name, kind in kinds.items()]

    def changes(self) -> dict[Target, Lora]:
        """Each weight's change of the model it is served on as a plain LoRA, scale folded in."""
        form, scale = self.adaptation.form, self.adaptation.recipe.scale
        return {
            target: form.change(self.starts[target.module], self.trained[target.module], scale)
            for target in self.targets
        }


def check_finished(path: Path) -> None:
    """Refuse what a training that has not ended left: its adapter is still the start, which changes
    nothing.

    Args:
        path: a run, or its state/ or adapter/; a folder without a training's record passes.

    Raises:
        CheckpointError: with what to do.
    """
    run = path.resolve().parent if path.resolve().name in ("state", "adapter") else path
    file = run / "run.json"
    status = read_json(file).get("status") if file.is_file() else "finished"
    if status != "finished":
        raise CheckpointError(
            f"{run} is a training that has not ended (status {status!r}), and its adapter is still the start: go on "
            f"with pissa train {run}/settings.yaml --resume, or use one of {run}/checkpoints"
        )


def write_state(folder: Path, state: State) -> None:
    """Write a `state/` folder.

    Args:
        folder: exists and is empty.
        state: what to write.
    """
    plain.save_tensors(_state_tensors(state), folder / STATE)
    write_json(folder / RECORD, state.record.to_json())


def write_adapter(folder: Path, state: State, changes: dict[Target, Lora] | None = None) -> None:
    """The plain LoRA folder of a state: its exact changes, or the given approximations of them."""
    record = state.record
    served_on = record.served_on or Base("unknown")
    config = plain.adapter_config(
        rank=1,
        alpha=1,
        base=served_on.name,
        revision=served_on.revision,
        target_modules=record.notes["target_modules"],
        transposed="conv1d" in {target.kind for target in state.targets},
        task_type=record.notes["task_type"],
        modules_to_save=record.notes["modules_to_save"],
    )
    lora = dataclasses.replace(record, kind="lora")
    plain.write_plain_lora(folder, changes or state.changes(), state.extras, config, lora)


def read_state(folder: Path) -> State:
    """Read a `state/` folder.

    Raises:
        CheckpointError: absent, damaged, or not whole.
    """
    record = Record.from_json(read_json(folder / RECORD), str(folder / RECORD))
    if record.kind != "state" or record.recipe is None or record.base is None:
        raise CheckpointError(
            f"{folder} is a {record.kind!r} folder, expected the state/ folder of a run"
        )
    absent = {"modules_to_save", "task_type", "target_modules", "shapes"} - record.notes.keys()
    if absent:
        raise CheckpointError(
            f"{folder / RECORD} lacks the notes {sorted(absent)}: the file is damaged"
        )
    try:
        tensors = load_file(folder / STATE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error}): go on from an earlier save"
        ) from error
    adaptation = Adaptation.of(record.recipe)
    by_module: dict[str, dict[str, Tensor]] = {module: {} for module in record.recipe.targets}
    extras: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module in by_module:
            by_module[module][part] = tensor
        else:
            extras[name] = tensor
    starts, trained = {}, {}
    for module, stored in by_module.items():
        try:
            starts[module], trained[module] = adaptation.form.from_state(stored)
        except KeyError as error:
            raise CheckpointError(
                f"{folder / STATE} lacks tensor '{module}.{error.args[0]}': the file is damaged, save the run again"
            ) from error
    state = State(record, adaptation, starts, trained, extras, record.notes["shapes"])
    _check_shapes(state, folder / STATE)
    return state


def _check_shapes(state: State, file: Path) -> None:
    for target in state.targets:
        rows, columns = target.matrix_shape
        rank = state.adaptation.recipe.rank_of(target.module)
        expected: dict[str, tuple[int, ...]] = {
            "left": (rows, rank),
            "right": (rank, columns),
            "core": (rank, rank),
        }
        for factors in (state.starts[target.module], state.trained[target.module]):
            for part, tensor in factors.named().items():
                along = state.starts[target.module].pattern
                shape = (
                    (1, along.shape[1])
                    if part == "core" and along is not None
                    else expected.get(part)
                )
                if shape and tuple(tensor.shape) != shape:
                    raise CheckpointError(
                        f"{file} holds a {part} factor {list(tensor.shape)} for `{target.module}`, expected "
                        f"{list(shape)}: the file is damaged, save the run again"
                    )


def _state_tensors(state: State) -> dict[str, Tensor]:
    tensors = dict(state.extras)
    for module, trained in state.trained.items():
        stored = state.adaptation.form.to_state(state.starts[module], trained)
        tensors |= {f"{module}.{name}": tensor for name, tensor in stored.items()}
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
