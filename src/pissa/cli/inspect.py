"""`pissa inspect PATH`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from pissa.cli import options, show


def inspect(
    path: Annotated[Path, Argument(help="Any model, run or adapter folder.")],
    base: Annotated[Path | None, Option(help="A model folder: does PATH belong to it?")] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a folder is and whether it is safe to serve.

    Also: which base it needs, and the spectrum and energy that the split kept. Exit status 1 if --base differs.
    """
    import pissa

    report = pissa.inspect(path, base)
    different = base is not None and report.base_check not in ("same", "not checked")
    if as_json:
        show.print_json(report.to_json())
        raise Exit(1 if different else 0)
    facts = {"this is": report.what, "safe to serve": report.safe_to_serve}
    if report.base:
        facts["base"] = " ".join(str(value) for value in (report.base["name"], report.base.get("revision")) if value)
    if report.base.get("fingerprint"):
        facts["fingerprint"] = report.base["fingerprint"][:16]
    if report.recipe:
        facts["split"] = ", ".join(f"{key} {value}" for key, value in report.recipe.items())
    if base is not None:
        facts["checked against"] = f"{base}: {report.base_check}"
    for key, value in facts.items():
        print(f"{key:16} {value}")
    if report.layers:
        rows = [
            [
                layer["name"],
                "x".join(map(str, layer["shape"])),
                layer["rank"],
                None if layer["energy"] is None else f"{layer['energy']:.1%}",
                *(f"{value:.3g}" for value in (layer["singular_values"][0], layer["singular_values"][-1])),
            ]
            for layer in report.layers
        ]
        show.print_table(["weight", "out x in", "rank", "energy", "first sigma", "last sigma"], rows)
    raise Exit(1 if different else 0)
