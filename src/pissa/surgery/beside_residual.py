"""The change of a run that was trained beside a quantised residual, as a plain LoRA for the original base.

What was trained stands for Q + s L R. Its change of W has full rank, for quantisation moved every weight, so no LoRA
is exact: the best one of a rank is computed weight by weight from the base and the residual on disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, kind_of
from pissa.errors import InputError
from pissa.linalg import frobenius, truncated_svd
from pissa.records import Record
from pissa.splits import Lora
from pissa.surgery.folders import Changes
from pissa.surgery.packing import PackedWeights


def refuse_exact(record: Record, run: Path) -> None:
    """There is no exact plain LoRA for the base; name the ways out.

    Raises:
        InputError: always.
    """
    assert record.recipe is not None and record.served_on is not None and record.base is not None
    raise InputError(
        f"{run} was trained beside its residual in {record.recipe.quant}: quantisation moved every weight of "
        f"{record.base.name}, so no LoRA on it is exact. Exact are: serving the residual {record.served_on.name} with "
        f"the run's adapter/, and `pissa merge {record.served_on.name} {run} OUT`, a 16-bit model. The best LoRA of a "
        "rank, with its error: --rank K"
    )


def best_changes(found: Changes, rank: int, base: Path, residual: Path) -> tuple[dict[Target, Lora], float]:
    """The best rank-`rank` change of each weight of the base, and the error over all relative to the whole change.

    Args:
        found: the run's factors beside its residual.
        rank: 1 or more.
        base: the original model.
        residual: the quantised one, both checked.
    """
    original, packed = Checkpoint.open(base), Checkpoint.open(residual)
    skeleton = build_skeleton(original.folder)
    weights = PackedWeights(packed)
    targets = list(found.changes)
    stored = stored_targets(targets, parameter_names(skeleton, original.tensors), original.folder)
    beside = stored_targets(targets, parameter_names(skeleton, packed.tensors), packed.folder)
    name_beside = {target: name for name, target in beside.items()}
    modules = dict(skeleton.named_modules())
    changes: dict[Target, Lora] = {}
    missed, total = 0.0, 0.0
    for name, target in stored.items():
        own = Target(target.module, kind_of(modules[target.module]) or target.kind, original.tensors[name].shape)
        pair, other = found.changes[target], name_beside[target]
        tensor = original.read(name)
        quantised = weights.dense(other) if other in weights.names else own.to_matrix(packed.read(other))
        whole = quantised.float() + pair.delta().float() - own.to_matrix(tensor)
        best = truncated_svd(whole, min(rank, *whole.shape), "fast", name=name)
        left, right = best.balanced()
        changes[own] = Lora(right, left)
        missed += frobenius(whole - left @ right) ** 2
        total += frobenius(whole) ** 2
    return changes, (missed / total) ** 0.5 if total else 0.0


def on_the_base(record: Record) -> Record:
    """The record of a LoRA that is right on the original base, made from one that was not."""
    assert record.recipe is not None
    recipe = dataclasses.replace(record.recipe, quant=None, double_quant=False, iterations=1)
    return dataclasses.replace(
        record, recipe=recipe, residual={}, notes={**record.notes, "beside": record.recipe.quant}
    )
