"""The change of a run that was trained beside a quantised residual, as a plain LoRA for the
original base.

What was trained stands for Q + s L R. Its change of W has full rank, for quantisation moved every
weight, so no LoRA is exact: the best one of a rank is computed weight by weight from the base and
the residual on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, kind_of
from pissa.errors import InputError
from pissa.linalg import frobenius, truncated_svd
from pissa.records import Record
from pissa.splits import Lora
from pissa.surgery.folders import Changes
from pissa.surgery.packing import PackedWeights
from pissa.untyped import Json


def no_exact(record: Record, run: Path) -> InputError:
    """The error of asking for an exact plain LoRA on the base, which there is none of; with the ways out."""
    residual = record.notes.get("residual", "RESIDUAL")
    return InputError(
        f"{run} was trained beside its residual in {record.beside}: quantisation moved every weight of "
        f"{record.made_of(str(run)).name}, so no LoRA on it is exact. Exact are: serving the residual {residual} with "
        f"the run's adapter/, and `pissa merge {residual} {run} OUT`, a 16-bit model. The best LoRA of a "
        "rank, with its error: --rank K"
    )


class WeightPairs:
    """Each target's weight in the original model and in the residual that a decomposition left of
    it.

    Args:
        base: the original model.
        residual: what was made from it, in few bits or not.
        targets: of the decomposition.
        config: of the model that the targets are named in, where it has another head than the base.
    """

    def __init__(
        self,
        base: Path,
        residual: Path,
        targets: Iterable[Target],
        config: Json | None = None,
    ) -> None:
        self._original, self._residual = Checkpoint.open(base), Checkpoint.open(residual)
        self._packed = PackedWeights(self._residual)
        skeleton = build_skeleton(self._original.folder, config=config)
        modules, targets = dict(skeleton.named_modules()), list(targets)
        here, beside = (
            {
                target.module: name
                for name, target in stored_targets(targets, names, checkpoint.folder).items()
            }
            for checkpoint in (self._original, self._residual)
            for names in [parameter_names(skeleton, checkpoint.tensors)]
        )
        self._names: dict[Target, tuple[str, str]] = {}
        for target in targets:
            name = here[target.module]
            kind = kind_of(modules[target.module]) or target.kind
            own = Target(target.module, kind, self._original.tensors[name].shape)
            self._names[own] = name, beside[target.module]

    @property
    def targets(self) -> list[Target]:
        """As the original model has them."""
        return list(self._names)

    def nbytes(self, target: Target) -> int:
        """Size of the stored weight of one of `targets`."""
        return self._original.tensors[self._names[target][0]].nbytes

    def read(self, target: Target) -> tuple[Tensor, Tensor]:
        """(weight, frozen part), both [out, in], of one of `targets`."""
        name, beside = self._names[target]
        packed = beside in self._packed.names
        frozen = (
            self._packed.dense(beside) if packed else target.to_matrix(self._residual.read(beside))
        )
        return target.to_matrix(self._original.read(name)), frozen


def best_changes(
    found: Changes, rank: int, base: Path, residual: Path
) -> tuple[dict[Target, Lora], float]:
    """The best rank-`rank` change of each weight of the base, and the error over all relative to
    the whole change.

    Args:
        found: the run's factors beside its residual.
        rank: 1 or more.
        base: the original model.
        residual: the quantised one, both checked.
    """
    pairs = {target.module: pair for target, pair in found.changes.items()}
    head_config = found.record.notes.get("model_config") if found.record else None
    weights = WeightPairs(base, residual, found.changes, head_config)
    changes: dict[Target, Lora] = {}
    missed, total = 0.0, 0.0
    for target in weights.targets:
        weight, frozen = weights.read(target)
        whole = frozen.float() + pairs[target.module].delta().float() - weight
        left, right = truncated_svd(
            whole, min(rank, *whole.shape), "fast", name=target.weight
        ).balanced()
        changes[target] = Lora(right, left)
        missed += frobenius(whole - left @ right) ** 2
        total += frobenius(whole) ** 2
    return changes, (missed / total) ** 0.5 if total else 0.0


def on_the_base(record: Record) -> Record:
    """The record of a LoRA that is right on the original base, made from one that was not."""
    recipe = record.split_by("this run")
    on_base = dataclasses.replace(recipe, quant=None, double_quant=False, iterations=1)
    notes = {**record.notes, "beside": record.beside}
    return dataclasses.replace(record, recipe=on_base, residual={}, notes=notes)
