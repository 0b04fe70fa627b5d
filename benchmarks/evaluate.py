"""The evaluations of docs/results: small real models before and after a PiSSA fine-tune, on all
five benchmarks.

    python benchmarks/evaluate.py SHARED OUT [--models stories260K,mixed-8m] [--limit 200] [--steps
    300]

SHARED holds models/ and data/. The fine-tune sees GSM8K's training questions, MBPP's questions 601
to 974 and Alpaca; none of the questions that are asked afterwards. A call that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from pissa.cli.eval import print_results
from pissa.cli.show import say, steps_progress
from pissa.config import load_settings
from pissa.evaluation.evaluate import evaluate
from pissa.training import train
from pissa.training.quiet import quiet

TASKS = ("gsm8k", "math", "humaneval", "mbpp", "mt_bench")
SETTINGS = {
    "method": "pissa", "rank": 16, "learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 4, "max_length": 320,
    "dtype": "float32", "warmup_ratio": 0.05, "template": "alpaca", "save_steps": 0, "eval_size": 64, "eval_steps": 100,
}  # fmt: skip


def mixture(data: Path) -> Iterator[dict[str, str]]:
    """Questions and answers of the three sources."""
    for line in (data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield {"instruction": row["question"], "output": row["answer"]}
    for line in (data / "mbpp/mbpp.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["task_id"] > 600:
            asked = f"{row['text']} Your code should pass these tests:\n\n" + "\n".join(
                row["test_list"]
            )
            code = row["code"].replace("\r", "")
            yield {"instruction": asked, "output": f"```python\n{code}\n```"}
    for row in json.loads((data / "alpaca/alpaca_5000.json").read_text(encoding="utf-8")):
        asked = "\n".join(part for part in (row["instruction"], row.get("input")) if part)
        yield {"instruction": asked, "output": row["output"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", default="stories260K,mixed-8m")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = list(mixture(asked.shared / "data"))
    random.Random(0).shuffle(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows if row["output"])
    (asked.out / "mixture.jsonl").write_text(text, encoding="utf-8")
    for name in asked.models.split(","):
        run = asked.out / f"{name}-pissa"
        model = asked.shared / "models" / name
        values = {"model": str(model), "data": str(asked.out / "mixture.jsonl"), "output": str(run)}
        say(f"## {name}")
        with quiet():
            train(
                load_settings(None, {**SETTINGS, **values, "max_steps": asked.steps}), resume=True
            )
            with steps_progress() as told:
                found = evaluate(
                    [str(run)],
                    asked.tasks.split(","),
                    asked.out / name,
                    data=str(asked.shared / "data"),
                    limit=asked.limit,
                    batch_size=asked.batch_size,
                    dtype="float32",
                    allow_code_execution=True,
                    say=told,
                )
        print_results(found)


if __name__ == "__main__":
    main()
