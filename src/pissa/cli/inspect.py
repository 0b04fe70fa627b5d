"""`pissa inspect PATH`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from pissa.cli import options, show
from pissa.errors import InputError
from pissa.untyped import Json


def inspect(
    path: Annotated[Path, Argument(help="Any model, run or adapter folder.")],
    base: Annotated[Path | None, Option(help="A model folder: does PATH belong to it?")] = None,
    errors: Annotated[
        bool,
        Option(
            "--errors",
            help="How far a quantised residual is from its base, beside nf4 alone and LoftQ.",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        Option(
            help="A text file: the errors of the layers' outputs on it too. Loads the whole base."
        ),
    ] = None,
    plot: Annotated[Path | None, Option(help="A PNG to draw the errors into.")] = None,
    workers: options.Workers = None,
    as_json: options.Json = False,
) -> None:
    """Say what a folder is and whether it is safe to serve.

    Also: which base it needs, and the spectrum and energy that the split kept. Exit status 1 if
        --base differs.
    --text and --plot ask for the errors too.
    """
    import pissa

    if plot and (plot.suffix.lower() != ".png" or plot.is_dir()):
        raise InputError(f"--plot is {plot}, expected the name of a file that ends in .png")
    if errors or text or plot:
        from pissa.training import quiet

        with quiet(), show.bytes_progress("comparing") as progress:
            report = pissa.inspect(
                path, base, errors=True, text=text, workers=workers, progress=progress
            )
    else:
        report = pissa.inspect(path, base)
    different = base is not None and report.base_check not in ("same", "not checked")
    if plot:
        from pissa.reports import plot_errors

        plot_errors(
            report.errors, plot, title=f"{path.name}: error relative to the original weights"
        )
        show.say(f"picture in {plot}")
    if as_json:
        show.print_json(report.to_json())
        raise Exit(1 if different else 0)
    facts = {"this is": report.what, "safe to serve": report.safe_to_serve}
    if report.base:
        facts["base"] = " ".join(
            str(value) for value in (report.base["name"], report.base.get("revision")) if value
        )
    if report.base.get("fingerprint"):
        facts["fingerprint"] = report.base["fingerprint"][:16]
    if report.recipe:
        facts["split"] = ", ".join(_words(report.recipe))
    if base is not None:
        facts["checked against"] = f"{base}: {report.base_check}"
    for key, value in facts.items():
        print(f"{key:16} {value}")
    if report.errors:
        _print_errors(report.errors)
    elif report.layers:
        _print_layers(report.layers)
        if report.kind == "decomposed" and report.recipe.get("quant"):
            show.say_next(f"pissa inspect {path} --plot errors.png")
    raise Exit(1 if different else 0)


def _words(recipe: Json) -> Iterator[str]:
    """How it was split; options by name, and of layers' own ranks the least and the most."""
    for key, value in recipe.items():
        if key == "ranks":
            yield from [f"ranks {min(value.values())} to {max(value.values())}"] if value else []
        elif key == "options":
            yield from (f"{name} {setting}" for name, setting in value.items())
        else:
            yield f"{key} {value}"


def _print_layers(layers: list[Json]) -> None:
    rows = [
        [
            layer["name"],
            "x".join(map(str, layer["shape"])),
            layer["rank"],
            None if layer["energy"] is None else f"{layer['energy']:.1%}",
            None if layer["error"] is None else f"{layer['error']:.1e}",
            *(
                f"{value:.3g}"
                for value in (layer["singular_values"][0], layer["singular_values"][-1])
            ),
        ]
        for layer in layers
    ]
    show.print_table(
        ["weight", "out x in", "rank", "energy", "error", "first sigma", "last sigma"], rows
    )


def _print_errors(errors: list[Json]) -> None:
    forms = errors[-1]["errors"]
    columns = [(norm, form) for norm in forms["this"] for form in forms]
    rows = []
    for row in errors:
        values = [row["errors"][form].get(norm) for norm, form in columns]
        rows.append(
            [
                row["type"],
                row["weights"],
                *(None if value is None else f"{value:.2%}" for value in values),
            ]
        )
    show.print_table(["type", "weights", *(f"{norm} {form}" for norm, form in columns)], rows)
