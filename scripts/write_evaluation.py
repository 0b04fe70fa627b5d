"""Put the evaluations of `benchmarks/evaluate.py`, and those of GLUE and fidelity, into docs/results.

    python scripts/write_evaluation.py SHARED OUT

SHARED holds models/ and data/. OUT has the folders of `CASES`, as far as they are there. Pages and numbers are copied
but for the places of these folders; prompts and answers stay where they are, since they quote the data sets.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from write_results import RESULTS, without_places

from pissa.evaluation.page import results_table
from pissa.evaluation.result import TaskResult

PAGE = RESULTS / "evaluation.md"
CASES = {
    "stories260K": ("results.json", "results.html"),
    "mixed-8m": ("results.json", "results.html"),
    "glue-minilm": ("glue.json", "glue.html"),
    "glue-minilm-240": ("glue.json", "glue.html"),
    "fidelity-mixed-8m": ("fidelity.json",),
}
LINK = re.compile(r'<a href="[^"#]*\.html">(.*?)</a>')
TABLES = re.compile(
    r"(<!-- (?P<name>[\w-]+): scripts/write_evaluation.py -->\n).*?(<!-- end of [\w-]+ -->)",
    re.DOTALL,
)


def main() -> None:
    """Read OUT, write docs/results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    for name, files in CASES.items():
        for file in files:
            if (asked.out / name / file).is_file():
                text = (asked.out / name / file).read_text(encoding="utf-8")
                (RESULTS / f"eval-{name}").mkdir(parents=True, exist_ok=True)
                kept = LINK.sub(r"\1", without_places(text, asked.shared, asked.out))
                (RESULTS / f"eval-{name}" / file).write_text(kept, encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def filled(page: str) -> str:
    """The page with each table as the numbers beside it have it."""
    return TABLES.sub(
        lambda found: found[1] + "\n".join(lines(found["name"])) + "\n" + found[3], page
    )


def lines(name: str) -> list[str]:
    """The table of a case in Markdown."""
    data = read(name)
    if name.startswith("glue-"):
        return _glue(data)
    if name == "fidelity-mixed-8m":
        return _fidelity(data)
    return results_table([TaskResult.from_json(one, name) for one in data["results"]])


def read(name: str) -> dict[str, Any]:
    """The numbers that docs/results holds of a case."""
    return json.loads((RESULTS / f"eval-{name}" / CASES[name][0]).read_text(encoding="utf-8"))


def _glue(data: dict[str, Any]) -> list[str]:
    tasks = data["tasks"]
    columns = [
        f"{task['title']}, {measure}" for task in tasks.values() for measure in task["measures"]
    ]
    rows = [
        [
            "majority class",
            *(f"{100 * task['floor'][m]:.1f}" for task in tasks.values() for m in task["measures"]),
        ]
    ]
    for method in next(iter(tasks.values()))["methods"]:
        cells = [
            _spread(task["methods"].get(method), m)
            for task in tasks.values()
            for m in task["measures"]
        ]
        rows.append([method, *cells])
    return _table(["", *columns], rows)


def _spread(found: dict[str, Any] | None, measure: str) -> str:
    scores = found and found["scores"].get(measure)
    if not found or not scores:
        return "–"
    edge = "*" if found["at_edge_of_grid"] else ""
    return f"{100 * scores['median']:.1f} ({100 * scores['deviation']:.1f}) at {found['learning_rate']:g}{edge}"


def _fidelity(data: dict[str, Any]) -> list[str]:
    columns = [
        "model",
        "kind",
        "dtype",
        "perplexity",
        "against base, %",
        "KL, nats",
        "top-1 agreement, %",
    ]
    rows = [
        [
            Path(row["model"]).name,
            row["kind"],
            row["dtype"],
            f"{row['perplexity']:.3f}",
            f"{100 * (row['ratio'] - 1):+.3f} ± {100 * (row['ratio_stderr'] or 0):.3f}",
            f"{row['kl']:.2e}",
            f"{100 * row['agreement']:.2f}",
        ]
        for row in data["rows"]
    ]
    return _table(columns, rows)


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    edge = "|".join(["---", *["---:"] * (len(columns) - 1)])
    return [f"| {' | '.join(columns)} |", f"|{edge}|", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    main()
