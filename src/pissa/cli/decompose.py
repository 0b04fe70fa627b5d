"""`pissa decompose MODEL OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from pissa.cli import options, show
from pissa.errors import InputError
from pissa.jobs import DecomposeSettings

if TYPE_CHECKING:
    from pissa.method import Method
    from pissa.observe import Observations

UNUSED_BY_FOUR_BITS = ("alpha", "dtype", "store", "device")
"""What a method that trains nothing has no use for."""


@options.flags(DecomposeSettings)
def decompose(
    model: Annotated[str, Argument(help="A folder with safetensors, or a Hub id.")],
    out: Annotated[Path, Argument(help="The folder to write.")],
    settings: DecomposeSettings,
    calibration: options.Calibration = None,
    calibration_rows: options.CalibrationRows = 64,
    as_json: options.Json = False,
) -> None:
    """Write a model's residual, with its start in OUT/pissa_init; with --quant in few bits.

    A few tensors are in memory at a time, so any size of model fits. Killed, it goes on when it is
    typed again.
    """
    import dataclasses

    import pissa
    from pissa.adapters.forms import form_of
    from pissa.presets import choose

    choice = choose(settings.method, settings.quant, settings.iterations, settings.double_quant)
    method = choice.method
    method.checked(settings.options)
    seen = _seen(model, out, settings, method, calibration, calibration_rows)
    if seen and not method.parts:
        _refuse_unused(settings)
        _four_bits(model, out, settings, seen, as_json)
        return
    with show.bytes_progress("decomposing") as progress:
        told = dataclasses.replace(settings, observations=seen, progress=progress)
        record = pissa.decompose(model, out, **vars(told))
    if as_json:
        show.print_json(record.to_json())
        return
    in_bits = f" in {record.beside}" if record.beside else ""
    start = f"its start ({settings.method}, rank {settings.rank})"
    show.say(f"{out}: residual of {model}{in_bits} and {start}, {len(record.layers)} weights")
    form = form_of(method, "residual", choice.quant is not None)
    if method.optimizer or form.beside_pair:
        show.say(
            f"it trains as {settings.method} with pissa train and pissa.load; stock peft trains the pair as a LoRA"
        )
    energy = sum(layer.energy for layer in record.layers) / len(record.layers)
    worst = max(record.layers, key=lambda layer: layer.error)
    show.say(
        f"energy in the trainable part {energy:.1%} (mean); largest error {worst.error:.1e} in {worst.name}"
    )
    show.say_next(f"pissa inspect {out}", f"pissa train CONFIG.yaml --model {out} --output run")


def _seen(
    model: str,
    out: Path,
    settings: DecomposeSettings,
    method: Method,
    calibration: str | None,
    rows: int,
) -> Observations | None:
    """What the method needs to have been seen of the model."""
    if not (calibration or method.observes):
        return None
    from pissa.checkpoint.output import check_target
    from pissa.training.calibration import for_method

    check_target(out, force=settings.force)  # before a model is loaded and read with
    keys = ("targets", "rank", "seed", "revision", "trust_remote_code")
    shared = {key: getattr(settings, key) for key in keys}
    return for_method(model, method, calibration, rows, **shared)


def _refuse_unused(settings: DecomposeSettings) -> None:
    """Flags that mean nothing to a method which trains nothing."""
    default = DecomposeSettings()
    given = {key: getattr(settings, key) for key in UNUSED_BY_FOUR_BITS}
    unused = [f"--{key} {value}" for key, value in given.items() if value != getattr(default, key)]
    if unused:
        raise InputError(
            f"got {', '.join(unused)} with {settings.method}, which has no use for it: leave it out"
        )


def _four_bits(
    model: str, out: Path, settings: DecomposeSettings, seen: Observations, as_json: bool
) -> None:
    """A method that trains nothing: a model that computes in 4 bits."""
    from pissa.jobs import FourBitSettings
    from pissa.w4a4 import svdquant

    shared = {
        key: getattr(settings, key) for key in vars(FourBitSettings(seen)) if key != "observations"
    }
    with show.bytes_progress("quantising") as progress:
        record = svdquant(model, out, seen, **{**shared, "progress": progress})
    if as_json:
        show.print_json(record.to_json())
        return
    errors = record.notes["output_errors"]
    worst = max(errors, key=errors.__getitem__)
    show.say(
        f"{out}: {model} in 4 bits, weights and activations, with branches of rank {settings.rank}: "
        f"{len(errors)} weights"
    )
    mean = sum(errors.values()) / len(errors)
    show.say(
        f"error of a layer's output on the calibration rows {mean:.1%} (mean), {errors[worst]:.1%} in {worst}"
    )
    show.say_next(f"pissa inspect {out}", f"pissa merge {model} {out} MERGED")
