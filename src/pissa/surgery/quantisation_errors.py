"""How far a quantised folder is from its base, beside plain quantisation and LoftQ, for each type of layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.adapters.adaptation import Adaptation
from pissa.adapters.plain import INIT
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.targets import Target
from pissa.jobs import Progress
from pissa.linalg import frobenius, nuclear
from pissa.records import Recipe
from pissa.surgery.activations import layer_inputs
from pissa.surgery.beside_residual import WeightPairs
from pissa.surgery.folders import adapter_targets
from pissa.surgery.pipeline import in_order
from pissa.untyped import Json

LOFTQ, THIS, ALL, WEIGHT = "loftq", "this", "all", "weight"
Sums = dict[str, dict[str, float]]
"""Form to norm to a sum over weights: squares for frobenius and output, values for nuclear."""


def quantisation_errors(
    folder: Path,
    recipe: Recipe,
    base: Path,
    *,
    text: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Json]:
    """Errors relative to the weights, a row for each type of layer and one for all.

    Args:
        folder: a decomposed folder whose residual is quantised.
        recipe: of it.
        base: its original model, checked.
        text: a file to compute the error of the layers' outputs on; the whole base is loaded for
            it.
        workers: weights worked on side by side.
        progress: told after every weight.

    Returns:
        ``{"type", "weights", "errors": {form: {norm: error}}}``; the forms are the quantiser alone
        (by its name), LoftQ at the same rank and rounds, and "this" folder; the norms "frobenius",
        "nuclear", and "output" where there is
        text: ``|E X| / |W X|`` over all tokens X and the weights that see them.
    """
    init = folder / INIT
    starts = adapter_targets(
        read_json(init / plain.CONFIG), Checkpoint.open(init, need_config=False)
    )
    pairs, by_module = (
        WeightPairs(base, folder, starts),
        {target.module: pair for target, pair in starts.items()},
    )
    inputs = layer_inputs(base, pairs.targets, text) if text else {}
    total = sum(map(pairs.nbytes, pairs.targets))
    loftq = Adaptation.of(dataclasses.replace(recipe, method=LOFTQ, options={}))
    sums: dict[str, Sums] = {}
    counts: dict[str, int] = {}
    done = 0

    def work(target: Target) -> tuple[Target, Sums]:
        weight, frozen = pairs.read(target)
        left, right = by_module[target.module]
        this = weight.float() - frozen.float() - recipe.scale * (left.float() @ right.float())
        others = _others(loftq, recipe.method, target.weight, weight, frozen.dtype)
        errors = {**others, THIS: this, WEIGHT: weight.float()}
        return target, {
            form: _norms(error, inputs.get(target.module)) for form, error in errors.items()
        }

    for target, found in in_order(work, pairs.targets, workers):
        for kind in (target.module.rpartition(".")[2], ALL):
            counts[kind] = counts.get(kind, 0) + 1
            sums[kind] = _added(sums[kind], found) if kind in sums else found
        done += pairs.nbytes(target)
        if progress:
            progress(target.weight, done, total)
    kinds = [*sorted(sums.keys() - {ALL}), ALL]
    return [
        {"type": kind, "weights": counts[kind], "errors": _relative(sums[kind])} for kind in kinds
    ]


def _others(
    loftq: Adaptation, this: str, name: str, weight: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the quantizer alone is off by, and LoftQ where `this` method is another one."""
    wide, packer, errors = weight.float(), loftq.quantizer, {}
    if packer is not None:
        errors[packer.name] = wide - packer.quantise(wide, dtype).dense.float()
    if this != LOFTQ:
        errors[LOFTQ] = wide - loftq.split(weight, name, dtype).rebuild()
    return errors


def _norms(matrix: Tensor, rows: Tensor | None) -> dict[str, float]:
    norms = {"frobenius": frobenius(matrix) ** 2, "nuclear": nuclear(matrix)}
    if rows is not None:
        norms["output"] = frobenius(rows.float() @ matrix.T) ** 2
    return norms


def _added(one: Sums, other: Sums) -> Sums:
    return {
        form: {
            norm: one[form].get(norm, 0.0) + other[form].get(norm, 0.0)
            for norm in {**one[form], **other[form]}
        }
        for form in one
    }


def _relative(sums: Sums) -> Sums:
    whole = sums[WEIGHT]
    return {
        form: {
            norm: (value / whole[norm]) ** (1.0 if norm == "nuclear" else 0.5)
            if whole[norm]
            else 0.0
            for norm, value in norms.items()
        }
        for form, norms in sums.items()
        if form != WEIGHT
    }
