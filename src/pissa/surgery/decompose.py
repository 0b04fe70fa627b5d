"""Checkpoint to checkpoint: the residual as an ordinary Hugging Face folder, the start beside it in `pissa_init/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pissa.adapters.splitting import at_full_rank, given_observations, refuse_unfit_targets
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target, find_targets
from pissa.checkpoint.writer import parse_bytes
from pissa.checks import chosen_device, scale_of, tolerance_of
from pissa.errors import CheckpointError, InputError, WrongBaseError
from pissa.observe import Observations
from pissa.presets import choose
from pissa.quant import quantiser
from pissa.records import Recipe, Record
from pissa.registry import get
from pissa.surgery.decomposition import Decomposition, Progress
from pissa.surgery.packing import is_residual, packed_modules
from pissa.surgery.pipeline import check_workers

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORES = ("packed", "16bit")


def decompose(
    source: str | Path,
    out: str | Path,
    method: str = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    targets: str | Iterable[str] = "all-linear",
    svd: str | float = "fast",
    seed: int = 0,
    dtype: str | None = None,
    quant: str | None = None,
    iterations: int | None = None,
    double_quant: bool = False,
    store: str = "packed",
    device: str = "cpu",
    workers: int | None = None,
    max_shard_bytes: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    observations: Observations | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Record:
    """Split every target of a checkpoint, as many tensors in memory as there are workers.

    A run that was killed goes on when it is called again in the same way, and ends with the same bits.

    Args:
        source: a folder or a Hub id.
        out: the folder to write; it appears whole or not at all.
        method: a name listed by `pissa methods`, or a preset: qlora, loftq, qpissa.
        rank: 1 to min(out, in) of the smallest target.
        alpha: above 0; by default `rank`, which makes the scale 1.
        targets: "all-linear", module names or endings, or a regular expression.
        svd: "fast", "exact" (certified to 1e-5) or a tolerance to certify.
        seed: fixes every random number together with the tensors' names.
        dtype: "float32", "bfloat16" or "float16" for the residual; as stored by default.
        quant: nf4, fp4 or int8 for the residual; None to leave it as it is, or as a preset says.
        iterations: rounds of alternation between the low-rank part and the quantised rest (pissa, loftq); 5 by default.
        double_quant: quantise the scales of the blocks too.
        store: "packed" writes a quantised residual in few bits, "16bit" what that stands for.
        device: where the algebra runs.
        workers: tensors worked on side by side, which the output does not depend on; one a core, up to 4, by default.
        max_shard_bytes: size of an output file, a number or "500MB".
        revision: of a Hub id.
        trust_remote_code: whether the model's own code may run; off by default.
        force: replace `out` if it exists.
        progress: told after every tensor.
        observations: what was seen of this model on calibration rows, for the methods that need it; or the file of it.
        options: the method's own settings by name.

    Returns:
        The record that was written as `pissa.json`.

    Raises:
        InputError, CheckpointError, WrongBaseError, OutputError: before `out` exists, naming tensor or key.
    """
    job = prepare(
        source,
        method,
        rank,
        alpha=alpha,
        targets=targets,
        svd=svd,
        seed=seed,
        dtype=dtype,
        quant=quant,
        iterations=iterations,
        double_quant=double_quant,
        store=store,
        device=device,
        max_shard_bytes=max_shard_bytes,
        revision=revision,
        trust_remote_code=trust_remote_code,
        observations=observations,
        options=options,
    )
    check_workers(workers)
    return job.into(Path(out), force=force, workers=workers, progress=progress)


def prepare(
    source: str | Path,
    method: str,
    rank: int,
    *,
    alpha: float | None = None,
    targets: str | Iterable[str] = "all-linear",
    svd: str | float = "fast",
    seed: int = 0,
    dtype: str | None = None,
    quant: str | None = None,
    iterations: int | None = None,
    double_quant: bool = False,
    store: str = "packed",
    device: str = "cpu",
    max_shard_bytes: int | str = "5GB",
    revision: str | None = None,
    trust_remote_code: bool = False,
    observations: Observations | str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Decomposition:
    """All that `decompose` can check before it writes anything; see there for the arguments and errors."""
    choice = choose(method, quant, iterations, double_quant)
    chosen = get(choice.method)
    own = chosen.checked(options)
    scale_of(alpha, rank)
    tolerance_of(svd)
    check_dtype(dtype)
    chosen_device(device)
    shard_bytes = parse_bytes(max_shard_bytes)
    if store not in STORES:
        raise InputError(f"store is {store!r}, expected one of {', '.join(STORES)}")
    if store != STORES[0] and not choice.quant:
        raise InputError(f"store is {store!r}, which has a meaning only with a quantiser: add --quant nf4")
    checkpoint = Checkpoint.open(source, revision)
    _refuse_unfit(checkpoint)
    skeleton = build_skeleton(checkpoint.folder, trust_remote_code=trust_remote_code)
    found = find_targets(skeleton, targets)
    refuse_unfit_targets(chosen, found)
    for target in sorted(found, key=lambda target: min(target.matrix_shape)):  # the narrowest says what fits all
        chosen.rank_at(rank, target.matrix_shape, target.weight)
    packed: frozenset[str] = frozenset()
    if choice.quant and store == "packed":
        packed = frozenset(packed_modules(quantiser(choice.quant, double=double_quant), found))
    parameters = parameter_names(skeleton, checkpoint.tensors)
    by_tensor = stored_targets(found, parameters, checkpoint.folder)
    _refuse_other_shapes(checkpoint, by_tensor)
    recipe = Recipe(
        choice.method,
        rank,
        float(rank if alpha is None else alpha),
        svd,
        seed,
        "residual",
        # bitsandbytes' layers hold GPT-2's transposed weights the usual way round.
        {target.module: "linear" if target.module in packed else target.kind for target in found},
        choice.quant,
        double_quant,
        choice.iterations,
        own,
    )
    dtypes = {name: output_dtype(info.dtype, dtype) for name, info in checkpoint.tensors.items()}
    recipe = at_full_rank(recipe, found)
    job = Decomposition(checkpoint, skeleton, parameters, by_tensor, recipe, dtypes, packed, device, shard_bytes)
    job.observations = given_observations(method, observations)
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
