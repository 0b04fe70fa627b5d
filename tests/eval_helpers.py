"""A pico language model that can hold a benchmark's prompts, and a few questions on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import pissa
from conftest import build_pico
from pissa.evaluation.evaluate import evaluate
from pissa.evaluation.result import TaskResult
from runs import language_model
from training_runs import save_tokenizer

QUESTIONS = [
    {
        "question": f"Tom has {n} apples and buys {n + 1} more. How many are there?",
        "answer": f"{n}+{n + 1}\n#### {2 * n + 1}",
    }
    for n in range(3, 9)
]


def speaker(folder: Path, seed: int = 0, positions: int = 320) -> Path:
    """One token a byte; the embedding is wide enough for logits that are sure of a byte."""
    model = build_pico(seed, vocab_size=260, max_position_embeddings=positions, eos_token_id=0)
    model.get_input_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def gsm8k(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """A `--data` folder."""
    (folder / "gsm8k").mkdir(parents=True, exist_ok=True)
    for name in ("test", "train"):
        text = "".join(json.dumps(row) + "\n" for row in rows or QUESTIONS)
        (folder / "gsm8k" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def moved_run(base: Path, run: Path, **settings: Any) -> Path:
    """A run whose factors were moved far enough to say something else."""
    model = pissa.attach(language_model(base), **{"method": "pissa", "rank": 4, **settings})
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(
                    0.3
                    * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                )
    pissa.save(model, run)
    return run


def ask(
    models: list[Path], out: Path, data: Path, tasks: list[str] | None = None, **settings: Any
) -> list[TaskResult]:
    """`evaluate` in small."""
    settings = {"batch_size": 2, "data": str(data), "device": "cpu", "base_row": False, **settings}
    return evaluate(
        [str(model) for model in models], ["gsm8k"] if tasks is None else tasks, out, **settings
    )


def samples(out: Path, model: str = "base", task: str = "gsm8k") -> list[dict[str, Any]]:
    """What was written of each answer."""
    return [
        json.loads(line)
        for line in (out / model / f"{task}.samples.jsonl").read_text().splitlines()
    ]


def answers(out: Path, model: str = "base", task: str = "gsm8k") -> list[dict[str, Any]]:
    """The log without its first line."""
    return [
        json.loads(line)
        for line in (out / model / f"{task}.answers.jsonl").read_text().splitlines()
    ][1:]
