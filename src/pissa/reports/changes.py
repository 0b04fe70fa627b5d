"""What a run changed: size, spectrum and turn of each layer, from thin factors, without a model in memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from pissa.adapters.state import RECORD, State, read_state
from pissa.checkpoint.fingerprint import canonical, check_tensor
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.errors import PissaError
from pissa.linalg import effective_rank, frobenius, principal_angles, product_singular_values
from pissa.records import Record
from pissa.splits import drift_as_lora


@dataclass(frozen=True)
class Change:
    """The change of one weight since the start of a run.

    Attributes:
        module: its path in the model.
        shape: [out, in].
        singular_values: of the change, descending; at most 2r are not zero.
        weight_norm: Frobenius norm of the weight; None where neither the record nor a base at hand
            says it.
        left_angles: principal angles in degrees between the left factor's column space and its
            start, ascending; empty for a start of zero and for a factor that does not train.
        right_angles: the same for the rows of the right factor.
    """

    module: str
    shape: tuple[int, int]
    singular_values: list[float]
    weight_norm: float | None
    left_angles: list[float]
    right_angles: list[float]

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return math.hypot(*self.singular_values)

    @property
    def relative(self) -> float | None:
        """The norm relative to the weight's."""
        return self.norm / self.weight_norm if self.weight_norm else None

    @property
    def effective_rank(self) -> float:
        """See `pissa.linalg.effective_rank`."""
        import torch

        return effective_rank(torch.tensor(self.singular_values))

    @property
    def place(self) -> tuple[int | None, str]:
        """The block, None where there is none, and the name inside it: (3, "self_attn.q_proj")."""
        found = re.search(r"\.(\d+)\.(.+)$", f".{self.module}")
        return (int(found[1]), found[2]) if found else (None, self.module)

    @property
    def label(self) -> str:
        """The module without what all of them begin with: 3.self_attn.q_proj."""
        block, name = self.place
        return name if block is None else f"{block}.{name}"


def changes_of(run: Path) -> list[Change]:
    """The change of every weight that a run split; none for a run without a state (full).

    Raises:
        CheckpointError: a state that is damaged.
    """
    if not (run / "state" / RECORD).is_file():
        return []
    state = read_state(run / "state")
    norms = _weight_norms(state)
    return [
        _change(state, target.module, target.matrix_shape, norms.get(target.module))
        for target in state.targets
    ]


def _change(state: State, module: str, shape: tuple[int, int], weight_norm: float | None) -> Change:
    start = state.starts[module]
    drift = state.adaptation.form.drift(start, state.trained[module])
    change = drift_as_lora(start, drift, state.adaptation.recipe.scale)
    values = product_singular_values(change.B, change.A).tolist()
    left, right = start.pair
    if drift.left is None or drift.right is None or not left.any():
        return Change(module, shape, values, weight_norm, [], [])
    return Change(
        module,
        shape,
        values,
        weight_norm,
        principal_angles(left, left + drift.left).rad2deg().tolist(),
        principal_angles(right.T, (right + drift.right).T).rad2deg().tolist(),
    )


def _weight_norms(state: State) -> dict[str, float]:
    """From the record, where the trainable part has a share of the weight; else from the base, if it is a folder."""
    layers = {layer.name.removesuffix(".weight"): layer for layer in state.record.layers}
    norms = {
        module: (sum(value**2 for value in layer.singular_values) / layer.energy) ** 0.5
        for module, layer in layers.items()
        if layer.energy > 0
    }
    if len(norms) == len(state.targets):
        return norms
    try:
        return _norms_on_disk(state, state.record)
    # The base is gone, is another one by now, or names its tensors in a way of its own
    except PissaError:
        return norms


def _norms_on_disk(state: State, record: Record) -> dict[str, float]:
    base = record.base
    if base is None or not Path(base.name).is_dir():
        return {}
    checkpoint = Checkpoint.open(base.name)
    skeleton = build_skeleton(checkpoint.folder)
    parameters = parameter_names(skeleton, checkpoint.tensors)
    norms = {}
    for name, target in stored_targets(state.targets, parameters, checkpoint.folder).items():
        weight, key = (
            checkpoint.read(name),
            canonical(parameters[name], getattr(skeleton, "base_model_prefix", "")),
        )
        if key in base.tensors:
            check_tensor(key, base.tensors[key], weight, what="the run", advice="")
        norms[target.module] = frobenius(weight.float())
    return norms
