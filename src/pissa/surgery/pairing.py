"""Whether a change and a model belong together, as far as their folders tell before a tensor is read."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pissa.adapters.plain import RECORD
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.errors import WrongBaseError
from pissa.records import Record
from pissa.surgery.folders import Changes
from pissa.surgery.packing import is_residual


def refuse_other_kind(checkpoint: Checkpoint, found: Changes, run: Path, advice: str) -> None:
    """A change of a base on its residual, or the other way round.

    Raises:
        WrongBaseError: with what to do.
    """
    record = found.record
    residual = is_residual(checkpoint.config)
    named = str(found.config.get("base_model_name_or_path"))
    if residual and found.record is None and Path(named).resolve() != checkpoint.folder.resolve():
        raise WrongBaseError(
            f"{run} has no pissa.json and names {named} as its base, and {checkpoint.name} is a residual: only an "
            "adapter that was trained on that residual is right with it, and names it"
        )
    if record and record.beside and not residual:
        raise WrongBaseError(
            f"{run} was trained beside its residual in {record.beside}, so its factors mean nothing on "
            f"{checkpoint.name}. {advice}"
        )
    if record and record.recipe and residual and not record.beside:
        weight = next(iter(found.changes)).weight
        raise WrongBaseError(
            f"{run} is for the original model: it changes `{weight}`, of which {checkpoint.name} holds the residual. "
            f"{advice}"
        )
    if checkpoint.config.get("quantization_config") and not residual:
        raise WrongBaseError(
            f"{checkpoint.name} is quantised, and a change merged into it would be rounded away: merge into the 16-bit "
            "model, and quantise the result with --quant nf4 if you must"
        )


def refuse_half_a_residual(
    checkpoint: Checkpoint, packed: Collection[str], changed: Collection[str], run: Path
) -> None:
    """A weight without its start would be a residual, or bare codes, in what looks like a model.

    Args:
        checkpoint: the base of a merge.
        packed: its weights in few bits.
        changed: its weights that the run holds something for.
        run: for the message.

    Raises:
        WrongBaseError: naming the first such weight.
    """
    split = set(packed)
    record = checkpoint.folder / RECORD
    if is_residual(checkpoint.config) and record.is_file():
        split |= {layer.name for layer in Record.from_json(read_json(record), str(record)).layers}
    bare = sorted((split & checkpoint.tensors.keys()) - set(changed))
    if bare:
        raise WrongBaseError(
            f"{run} holds nothing for `{bare[0]}` ({len(bare)} such), of which {checkpoint.name} is the residual: "
            "merge the run or adapter that began with its pissa_init/"
        )
