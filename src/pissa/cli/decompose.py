"""`pissa decompose MODEL OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from pissa.cli import options, show
from pissa.errors import InputError

if TYPE_CHECKING:
    from pissa.observe import Observations


def decompose(
    model: Annotated[str, Argument(help="A folder with safetensors, or a Hub id.")],
    out: Annotated[Path, Argument(help="The folder to write.")],
    method: options.Method = "pissa",
    rank: options.Rank = 16,
    alpha: options.Alpha = None,
    targets: options.Targets = "all-linear",
    svd: options.Svd = "fast",
    seed: options.Seed = 0,
    dtype: options.Dtype = None,
    quant: options.Quant = None,
    iterations: options.Iterations = None,
    double_quant: options.DoubleQuant = False,
    settings: options.Settings = None,
    calibration: options.Calibration = None,
    calibration_rows: options.CalibrationRows = 64,
    store: options.Store = "packed",
    device: options.Device = "cpu",
    workers: options.Workers = None,
    max_shard_bytes: options.MaxShardBytes = "5GB",
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write a model's residual, with its start in OUT/pissa_init; with --quant in few bits.

    A few tensors are in memory at a time, so any size of model fits. Killed, it goes on when it is typed again.
    """
    import pissa
    from pissa.presets import PRESETS, choose, observed
    from pissa.registry import OPTIMISER, get

    wanted, own = options.target_list(targets), options.named(settings)
    choose(method, quant, iterations, double_quant)
    get(PRESETS.get(method, (method,))[0]).checked(own)
    seen = None
    if calibration or observed(method):
        from pissa.checkpoint.output import check_target
        from pissa.training.calibration import for_method

        check_target(out, force=force)  # before a model is loaded and read with
        seen = for_method(
            model,
            method,
            calibration,
            calibration_rows,
            targets=wanted,
            rank=rank,
            seed=seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if seen and not get(method).parts:
        _refuse_unused(method, alpha=alpha, dtype=dtype, store=None if store == "packed" else store, device=device)
        _four_bits(
            model,
            out,
            seen,
            rank,
            as_json,
            targets=wanted,
            svd=svd,
            seed=seed,
            options=own,
            workers=workers,
            max_shard_bytes=max_shard_bytes,
            revision=revision,
            trust_remote_code=trust_remote_code,
            force=force,
        )
        return
    with show.bytes_progress("decomposing") as progress:
        record = pissa.decompose(
            model,
            out,
            method,
            rank,
            alpha=alpha,
            targets=wanted,
            svd=svd,
            seed=seed,
            dtype=dtype,
            quant=quant,
            iterations=iterations,
            double_quant=double_quant,
            store=store,
            device=device,
            workers=workers,
            max_shard_bytes=max_shard_bytes,
            revision=revision,
            trust_remote_code=trust_remote_code,
            force=force,
            progress=progress,
            observations=seen,
            options=own,
        )
    if as_json:
        show.print_json(record.to_json())
        return
    in_bits = f" in {record.recipe.quant}" if record.recipe and record.recipe.quant else ""
    show.say(f"{out}: residual of {model}{in_bits} and its start ({method}, rank {rank}), {len(record.layers)} weights")
    chosen = get(choose(method).method)
    if chosen.has_core or chosen.needs == OPTIMISER:
        show.say(f"it trains as {method} with pissa train and pissa.load; stock peft trains the pair as a LoRA")
    energy = sum(layer.energy for layer in record.layers) / len(record.layers)
    worst = max(record.layers, key=lambda layer: layer.error)
    show.say(f"energy in the trainable part {energy:.1%} (mean); largest error {worst.error:.1e} in {worst.name}")
    show.say_next(f"pissa inspect {out}", f"pissa train CONFIG.yaml --model {out} --output run")


def _refuse_unused(method: str, device: str, **given: Any) -> None:
    """Flags that mean nothing to a method which trains nothing."""
    unused = [f"--{name} {value}" for name, value in given.items() if value is not None]
    unused += [f"--device {device}"] if device != "cpu" else []
    if unused:
        raise InputError(f"got {', '.join(unused)} with {method}, which has no use for it: leave it out")


def _four_bits(model: str, out: Path, seen: Observations, rank: int, as_json: bool, **settings: Any) -> None:
    """A method that trains nothing: a model that computes in 4 bits."""
    from pissa.w4a4 import svdquant

    with show.bytes_progress("quantising") as progress:
        record = svdquant(model, out, seen, rank, progress=progress, **settings)
    if as_json:
        show.print_json(record.to_json())
        return
    errors = record.notes["output_errors"]
    worst = max(errors, key=errors.__getitem__)
    show.say(f"{out}: {model} in 4 bits, weights and activations, with branches of rank {rank}: {len(errors)} weights")
    mean = sum(errors.values()) / len(errors)
    show.say(f"error of a layer's output on the calibration rows {mean:.1%} (mean), {errors[worst]:.1%} in {worst}")
    show.say_next(f"pissa inspect {out}", f"pissa merge {model} {out} MERGED")
