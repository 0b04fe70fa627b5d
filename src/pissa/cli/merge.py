"""`pissa merge BASE RUN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from pissa.cli import options, show
from pissa.jobs import MergeSettings


@options.flags(MergeSettings)
def merge(
    base: Annotated[
        str,
        Argument(help="The original model, or the residual that a quantised run was trained on."),
    ],
    run: Annotated[Path, Argument(help="A run or a plain LoRA adapter.")],
    out: Annotated[Path, Argument(help="The folder to write.")],
    settings: MergeSettings,
    as_json: options.Json = False,
) -> None:
    """Write base plus change as an ordinary model.

    A few tensors are in memory at a time, so any size of model fits. The result is in the base's
    own dtype, and in few bits only where --quant asks for it.
    """
    import pissa
    from pissa.surgery.folders import kind_of_folder

    if kind_of_folder(run) == "w4a4":
        _sixteen_bits(base, run, out, settings, as_json)
        return
    with show.bytes_progress("merging") as progress:
        record = pissa.merge(base, run, out, **{**vars(settings), "progress": progress})
    if as_json:
        show.print_json(record.to_json())
        return
    show.say(f"{out}: {base} with {run} merged in")
    errors = record.notes["errors"]
    if settings.quant or "nf4" in errors:
        in_bits = f"; in nf4 they would lose {errors['nf4']:.1%}" if "nf4" in errors else ""
        show.say(f"rounding lost {errors['written']:.2%} of the merged weights{in_bits}")
    show.say_next(f"pissa inspect {out}", f"vllm serve {out}")


def _sixteen_bits(base: str, run: Path, out: Path, settings: MergeSettings, as_json: bool) -> None:
    """What a model in 4 bits stands for; the base is only compared with the one it was made from."""
    from pissa.checkpoint.output import read_json
    from pissa.errors import InputError
    from pissa.jobs import DenseSettings
    from pissa.records import Record
    from pissa.surgery.convert import check_folder
    from pissa.w4a4 import export_dense

    if settings.quant:
        raise InputError(
            f"quant is {settings.quant}, but {run} is in few bits already: leave it out for its dense weights"
        )
    made = Record.from_json(read_json(run / "pissa.json"), str(run / "pissa.json"))
    check_folder(made, Path(base), f"the model in {run}")
    shared = {key: getattr(settings, key) for key in vars(DenseSettings())}
    with show.bytes_progress("merging") as progress:
        record = export_dense(run, out, **{**shared, "progress": progress})
    if as_json:
        show.print_json(record.to_json())
        return
    show.say(
        f"{out}: what the 4-bit weights of {run} stand for; its activations are no longer quantised"
    )
    show.say_next(f"pissa inspect {out}", f"vllm serve {out}")
