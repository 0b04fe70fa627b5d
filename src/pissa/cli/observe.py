"""`pissa observe MODEL DATA FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pissa.cli import options, show


def observe(
    model: Annotated[str, Argument(help="A folder with safetensors and a tokenizer, or a Hub id.")],
    data: Annotated[
        str,
        Argument(help="Rows as for training: json, jsonl, csv, tsv, parquet, folder, or a Hub id."),
    ],
    file: Annotated[Path, Argument(help="The safetensors file to write.")],
    needs: Annotated[
        str, Option(help="What to gather, with commas: covariance, components, gradient, inputs.")
    ] = "covariance,components,gradient,inputs",
    rows: options.CalibrationRows = 64,
    rank: Annotated[
        int,
        Option(help="Largest rank that the components must do for (four times as many are kept)."),
    ] = 16,
    targets: options.Targets = "all-linear",
    template: Annotated[
        str, Option(help="Prompt around the rows: auto, alpaca, chat, plain, none.")
    ] = "auto",
    max_length: Annotated[int, Option(help="Tokens per row; longer rows lose their end.")] = 512,
    seed: options.Seed = 0,
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = False,
    force: Annotated[bool, Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Read rows once and keep what methods need to have seen of each layer, for many methods and
    ranks.

    Then: pissa decompose MODEL OUT --method corda --calibration FILE.
    """
    from pissa.errors import InputError, OutputError
    from pissa.method import OBSERVED
    from pissa.registry import methods
    from pissa.training.calibration import SAVED, calibrate

    wanted = [need.strip() for need in needs.split(",")]
    unknown = [need for need in wanted if need not in OBSERVED]
    if unknown:
        raise InputError(
            f"--needs is {needs!r}, expected some of {', '.join(OBSERVED)}, with commas"
        )
    if file.suffix != SAVED:
        raise OutputError(f"{file} has the ending {file.suffix!r}, expected {SAVED}")
    if file.exists() and not force:
        raise OutputError(f"{file} is there: replace it with --force, or choose another file")
    seen = calibrate(
        model,
        data,
        rows,
        wanted,
        rank=rank,
        targets=options.target_list(targets),
        template=template,
        max_length=max_length,
        seed=seed,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    seen.save(file, force=force)
    show.say(f"{file}: {needs} of {len(seen.base)} weights, {file.stat().st_size / 1e6:.1f} MB")
    fitting = [one.name for one in methods().values() if one.needs in wanted]
    show.say_next(
        *(f"pissa decompose {model} OUT --method {name} --calibration {file}" for name in fitting)
    )
