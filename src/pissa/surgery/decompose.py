"""Checkpoint to checkpoint: the residual as an ordinary Hugging Face folder, the start beside it in `pissa_init/`."""

from __future__ import annotations

from pathlib import Path

import torch

from pissa.adapters.adaptation import Adaptation, refuse_untrained
from pissa.adapters.splitting import given_observations
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, find_targets
from pissa.checkpoint.writer import parse_bytes
from pissa.checks import chosen_device, scale_of, tolerance_of
from pissa.errors import CheckpointError, InputError, WrongBaseError
from pissa.jobs import DecomposeSettings
from pissa.keywords import spelled_out
from pissa.presets import Choice, choose
from pissa.records import Recipe, Record
from pissa.surgery.decomposition import Decomposition
from pissa.surgery.packing import is_residual, packed_modules
from pissa.surgery.pipeline import check_workers

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORES = ("packed", "16bit")


@spelled_out(DecomposeSettings)
def decompose(source: str | Path, out: str | Path, settings: DecomposeSettings) -> Record:
    """Split every target of a checkpoint, as many tensors in memory as there are workers.

    A run that was killed goes on when it is called again in the same way, and ends with the same
    bits.

    Args:
        source: a folder or a Hub id.
        out: the folder to write; it appears whole or not at all.
        settings: a keyword argument each, see `pissa.jobs`.

    Returns:
        The record that was written as `pissa.json`.

    Raises:
        InputError, CheckpointError, WrongBaseError, OutputError: before `out` exists, naming tensor
            or key.
    """
    job = prepare(source, settings)
    check_workers(settings.workers)
    return job.into(out, force=settings.force, workers=settings.workers, progress=settings.progress)


def prepare(
    source: str | Path, settings: DecomposeSettings, choice: Choice | None = None
) -> Decomposition:
    """All that `decompose` can check before it writes anything.

    Args:
        source: a folder or a Hub id.
        settings: see `decompose`.
        choice: the method and quantizer that the settings name, where they are at hand.

    Raises:
        InputError, CheckpointError, WrongBaseError: naming tensor or key.
    """
    asked = settings
    if choice is None:
        choice = choose(asked.method, asked.quant, asked.iterations, asked.double_quant)
    method = choice.method
    own = method.checked(asked.options)
    scale_of(asked.alpha, asked.rank)
    tolerance_of(asked.svd)
    check_dtype(asked.dtype)
    chosen_device(asked.device)
    shard_bytes = parse_bytes(asked.max_shard_bytes)
    if asked.store not in STORES:
        raise InputError(f"store is {asked.store!r}, expected one of {', '.join(STORES)}")
    if asked.store != STORES[0] and not choice.quant:
        raise InputError(
            f"store is {asked.store!r}, which has a meaning only with a quantiser: add --quant nf4"
        )
    checkpoint = Checkpoint.open(source, asked.revision)
    _refuse_unfit(checkpoint)
    skeleton = build_skeleton(checkpoint.folder, trust_remote_code=asked.trust_remote_code)
    found = find_targets(skeleton, asked.targets)
    refuse_untrained(method)
    recipe = Recipe(
        method.name,
        asked.rank,
        float(asked.rank if asked.alpha is None else asked.alpha),
        asked.svd,
        asked.seed,
        "residual",
        {target.module: target.kind for target in found},
        choice.quant,
        asked.double_quant,
        choice.iterations,
        own,
    )
    adaptation = Adaptation.of(recipe, method)
    adaptation.refuse_unfit(found)
    # The narrowest first: it says what fits all.
    for target in sorted(found, key=lambda target: min(target.matrix_shape)):
        method.rank_at(asked.rank, target.matrix_shape, target.weight)
    packed: frozenset[str] = frozenset()
    if adaptation.quantizer and asked.store == "packed":
        packed = frozenset(packed_modules(adaptation.quantizer, found))
        # bitsandbytes' layers hold GPT-2's transposed weights the usual way round.
        kinds = {t.module: "linear" if t.module in packed else t.kind for t in found}
        adaptation = adaptation.changed(targets=kinds)
    parameters = parameter_names(skeleton, checkpoint.tensors)
    by_tensor = stored_targets(found, parameters, checkpoint.folder)
    _refuse_other_shapes(checkpoint, by_tensor)
    job = Decomposition(
        checkpoint,
        skeleton,
        parameters,
        by_tensor,
        adaptation.at_full_rank(found),
        {name: output_dtype(info.dtype, asked.dtype) for name, info in checkpoint.tensors.items()},
        packed,
        asked.device,
        shard_bytes,
        given_observations(method, asked.observations),
    )
    job.allot()
    job.check()
    return job


def check_dtype(asked: str | None) -> None:
    """Refuse what cannot be asked of an output."""
    if asked is not None and asked not in STORED:
        raise InputError(f"dtype is {asked!r}, expected one of {', '.join(STORED)}")


def output_dtype(own: torch.dtype, asked: str | None) -> torch.dtype:
    """What a tensor is written in: as asked, or as it is where nothing is asked or it holds no floats."""
    return STORED[asked] if asked and own.is_floating_point else own


def _refuse_other_shapes(checkpoint: Checkpoint, targets: dict[str, Target]) -> None:
    for name, target in targets.items():
        got = checkpoint.tensors[name].shape
        if got != target.shape:
            raise CheckpointError(
                f"`{name}` is {list(got)} in {checkpoint.name}, expected {list(target.shape)} from its config.json: "
                "config and weights are of different models, fetch both again"
            )


def _refuse_unfit(checkpoint: Checkpoint) -> None:
    if is_residual(checkpoint.config):
        base = checkpoint.config["pissa"].get("base")
        raise WrongBaseError(
            f"{checkpoint.name} is itself a residual, of {base!r}: decompose that original model instead"
        )
    quantised = checkpoint.config.get("quantization_config")
    if quantised:
        raise InputError(
            f"{checkpoint.name} is quantised ({quantised.get('quant_method', 'unknown method')} in config.json): "
            "decompose the 16-bit model it was made from, with --quant for a quantised residual"
        )
