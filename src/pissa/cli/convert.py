"""`pissa convert RUN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from pissa.cli import options, show
from pissa.jobs import ConvertSettings


@options.flags(ConvertSettings)
def convert(
    run: Annotated[
        Path,
        Argument(help="A run, a plain LoRA, or with --start an adapter trained by stock peft."),
    ],
    out: Annotated[Path, Argument(help="The folder to write.")],
    settings: ConvertSettings,
    as_json: options.Json = False,
) -> None:
    """Write a plain LoRA that any tool loads on the base."""
    import pissa
    from pissa.reports import served_rank, write_card

    record = pissa.convert(run, out, **vars(settings))
    if (run / "run.json").is_file():
        write_card(run, out)
    if as_json:
        show.print_json(record.to_json())
        return
    base = record.made_of(str(out)).name
    error, width = record.notes["error"], record.notes["rank"]
    show.say(
        f"{out}: plain LoRA of rank {width}, "
        + ("exact" if error == 0 else f"error {error:.1%} of the change")
    )
    if "beside" in record.notes:
        show.say(
            "the change includes what quantisation moved in every weight; for what was trained, whole, use pissa merge "
            "or serve the residual with the run's adapter/"
        )
    show.say_next(
        f"pissa inspect {out} --base {base}",
        f"pissa merge {base} {out} merged",
        f"vllm serve {base} --enable-lora --max-lora-rank {served_rank(width)} --lora-modules mine={out}",
    )
