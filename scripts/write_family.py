"""Put the comparison of the whole family into docs/results/family.md: tables between marks, beside the words there.

    python scripts/write_family.py SHARED OUT [--one-pass family.json] [--four-bits svdquant-MODEL.json ...]

OUT is the folder that `benchmarks/compare.py` was given; the two JSON files are what `benchmarks/family.py` and
`benchmarks/svdquant.py` printed. Pages and numbers of the comparisons are copied beside the page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from write_results import RESULTS, keep, without_places

from pissa.registry import CONTROL

CASES = ("family-mixed-8m", "family-minilm-mrpc")
PAGE = RESULTS / "family.md"
DATA = RESULTS / "family.json"
CURVES = ("plain", "W C", "W C^1/2")


def main() -> None:
    """Read OUT and the JSON files, write docs/results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--one-pass", type=Path)
    parser.add_argument("--four-bits", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    for name in CASES:
        keep(name, asked.shared, asked.out)
    kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
    if asked.one_pass:
        kept["one pass"] = one_pass(json.loads(asked.one_pass.read_text(encoding="utf-8")))
    if asked.four_bits:
        kept["four bits"] = [
            json.loads(file.read_text(encoding="utf-8")) for file in asked.four_bits
        ]
    text = json.dumps(kept, indent=1)
    DATA.write_text(without_places(text, asked.shared, asked.out) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with every table between its marks made anew."""
    kept = json.loads(DATA.read_text(encoding="utf-8"))
    tables = {name: compared(read(name)) for name in CASES}
    tables["truncated"] = truncated(kept["one pass"]["truncated"])
    tables["first-step"] = first_step(kept["one pass"]["first step"])
    for name, table in tables.items():
        before, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert mark and end, f"{PAGE} lacks the marks of {name}"
        page = before + mark + table + end + after
    return page


def read(name: str) -> dict[str, Any]:
    """The numbers of a comparison that docs/results holds."""
    return json.loads((RESULTS / name / "compare.json").read_text(encoding="utf-8"))


def compared(numbers: dict[str, Any]) -> str:
    """A line for each method at its best rate, its random control beside it; the best first."""
    best, scored = (
        numbers["best_of_grid"],
        "accuracy" in next(iter(numbers["best_of_grid"].values())),
    )
    least = min(cell["learning_rate"] for cell in numbers["cells"] if cell["method"] == "lora")
    head = [
        "method",
        "trains",
        "best rate",
        "loss",
        "less lora's",
        "its control's",
        f"loss at {least:g}",
    ]
    head += (["accuracy", "F1"] if scored else []) + ["seconds", "peak MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    methods = [name for name in best if not name.endswith(CONTROL)]
    for method in sorted(methods, key=lambda name: best[name]["loss"]["mean"]):
        own = best[method]
        cells = [
            cell
            for cell in numbers["cells"]
            if cell["method"] == method and cell["status"] == "finished"
        ]
        control = best.get(method + CONTROL)
        row = [
            method,
            f"{cells[0]['trainable_parameters']:,}",
            f"{own['learning_rate']:g}{'*' if own['at_edge_of_grid'] else ''}",
            loss_of(own),
            verdict(own["against_reference"]),
            loss_of(control) if control else "",
            mean_at(cells, least),
        ]
        row += [f"{own[score]['mean']:.3f}" for score in ("accuracy", "f1")] if scored else []
        row += [f"{statistics.median(cell['seconds'] for cell in cells):.0f}"]
        row += [f"{statistics.median(cell['peak_memory_bytes'] for cell in cells) / 2**20:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def loss_of(best: dict[str, Any]) -> str:
    """Mean and standard error."""
    return f"{best['loss']['mean']:.3f} ± {best['loss']['stderr']:.3f}"


def mean_at(cells: list[dict[str, Any]], rate: float) -> str:
    """The mean loss at one rate; nothing where it was not tried."""
    losses = [cell["eval_loss"] for cell in cells if cell["learning_rate"] == rate]
    return f"{statistics.mean(losses):.3f}" if losses else ""


def verdict(test: dict[str, Any] | None) -> str:
    """The difference and its standard error; ↓ and ↑ where the paired test tells it from zero, = where not."""
    if not test:
        return ""
    mark = {"lower": "↓", "higher": "↑"}.get(test["verdict"], "=")
    return f"{test['difference']:+.3f} ± {test['stderr']:.3f} {mark}"


def one_pass(found: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of `benchmarks/family.py`: curves, and cosines as means over layers."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["first step"]:
        groups.setdefault((row["start"], row["gradient"]), []).append(row)
    means = [
        {
            "start": start,
            "gradient": gradient,
            "layers": len(rows),
            **{step: statistics.mean(row[step] for row in rows) for step in ("SGD", "LoRA-Pro")},
        }
        for (start, gradient), rows in groups.items()
    ]
    return {"settings": found["settings"], "truncated": found["truncated"], "first step": means}


def truncated(rows: list[dict[str, Any]]) -> str:
    """Perplexity without a share of the components, a line a text and curve."""
    shares = sorted({row["share"] for row in rows})
    texts = [key for key in rows[0] if key not in ("curve", "share")]
    lines = [
        "| text | curve | " + " | ".join(f"{share:g}" for share in shares) + " |",
        "|---" * (len(shares) + 2) + "|",
    ]
    for text in texts:
        for curve in CURVES:
            values = {row["share"]: row[text] for row in rows if row["curve"] == curve}
            lines.append(
                f"| {text} | {curve} | "
                + " | ".join(f"{values[share]:.1f}" for share in shares)
                + " |"
            )
    return "\n".join(lines) + "\n"


def first_step(rows: list[dict[str, Any]]) -> str:
    """Mean cosine over layers with the full gradient, the largest first."""
    cosines = {(row["start"], row["gradient"]): row for row in rows}
    starts = sorted(
        {start for start, _ in cosines}, key=lambda start: -cosines[start, "calibration"]["SGD"]
    )
    lines = [
        "| start | SGD, rows seen | SGD, other rows | LoRA-Pro's step, rows seen |",
        "|---|---|---|---|",
    ]
    for start in starts:
        seen, other = cosines[start, "calibration"], cosines[start, "held out"]
        lines.append(
            f"| {start} | {seen['SGD']:.3f} | {other['SGD']:.3f} | {seen['LoRA-Pro']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
