"""The main job from end to end on the model that the package carries: decompose, train three ways, convert, prove."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pissa.checkpoint.output import staged_output, write_json
from pissa.config import load_settings
from pissa.errors import PissaError, require
from pissa.reports import plot_losses
from pissa.surgery.convert import convert
from pissa.surgery.decompose import decompose
from pissa.training import quiet, train
from pissa.untyped import Json

HERE = Path(__file__).parent
MODEL, DATA = HERE / "model", HERE / "data"
METHODS = ("full", "lora", "pissa")
SETTINGS: dict[str, object] = {
    "rank": 8,
    "learning_rate": 1e-3,
    "batch_size": 16,
    "max_steps": 80,
    "max_length": 192,
    "warmup_ratio": 0.05,
    "eval_steps": 20,
    "save_steps": 0,
    "dtype": "float32",
    "device": "cpu",
    "seed": 0,
}
"""The same for all three methods; one learning rate, so this shows speed at equal settings, not who wins when tuned."""
SAME_LOGITS = 1e-4


@dataclass(frozen=True)
class Row:
    """One method's line in the table."""

    method: str
    trainable: int
    start_loss: float
    end_loss: float
    seconds: float


@dataclass(frozen=True)
class Proof:
    """What stock peft gave with the converted adapter on the original base."""

    rank: int
    difference: float
    moved: float


def demo(out: str | Path, *, force: bool = False, say: Callable[[str], None] = print) -> Json:
    """Run the demo into a folder.

    Args:
        out: the folder to write: decomposed/, a run per method, plain-lora/, loss.png, demo.json.
        force: replace `out`.
        say: told what happens.

    Returns:
        The content of demo.json: rows (one per method) and proof.

    Raises:
        PissaError: if stock peft's logits differ from the trained model's by more than 1e-4.
    """
    require("trl", "train")
    require("matplotlib", "train")
    folder = Path(out).resolve()
    with staged_output(folder, force=force):
        pass  # an empty folder, after the usual checks; what goes into it names its own path
    say("1/4 decompose: the residual as a model folder, its principal part beside it")
    decompose(MODEL, folder / "decomposed", method="pissa", rank=8, dtype="float32")
    rows = []
    for method in METHODS:
        say(
            f"2/4 train: {method}, {SETTINGS['max_steps']} steps on documentation, from the same start"
        )
        rows.append(_train(method, folder / method))
    say("3/4 convert: the PiSSA run as a plain LoRA")
    convert(folder / "pissa", folder / "plain-lora")
    say("4/4 prove: stock peft, original model, plain LoRA")
    with quiet():
        proof = prove(folder / "pissa", folder / "plain-lora")
    if proof.difference > SAME_LOGITS:
        raise PissaError(
            f"stock peft's logits are off by {proof.difference:.1e}, expected at most {SAME_LOGITS:.0e}"
        )
    runs = {method: folder / method / "metrics.jsonl" for method in METHODS}
    plot_losses(
        runs, folder / "loss.png", title="From source code to documentation, equal settings"
    )
    result = {"settings": SETTINGS, "rows": [asdict(row) for row in rows], "proof": asdict(proof)}
    write_json(folder / "demo.json", result)
    return result


def prove(run: Path, lora: Path) -> Proof:
    """Logits of the run in its own form against those of stock peft with the plain LoRA on the original base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pissa.adapters.runs import load

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with (DATA / "eval.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(8), strict=False)]
    batch = tokenizer(
        [row["prompt"] + row["completion"] for row in rows], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        trained = load(base(), run, trainable=False)(**batch).logits
        stock = PeftModel.from_pretrained(base(), str(lora)).eval()(**batch).logits
        start = base()(**batch).logits
    config = json.loads((lora / "adapter_config.json").read_text())
    return Proof(
        config["r"], float((stock - trained).abs().max()), float((start - trained).abs().max())
    )


def _train(method: str, out: Path) -> Row:
    paths = {
        "model": str(MODEL),
        "data": str(DATA / "train.jsonl"),
        "eval_data": str(DATA / "eval.jsonl"),
    }
    settings = load_settings(None, {**SETTINGS, **paths, "method": method, "output": str(out)})
    began = time.monotonic()
    record = train(settings)
    evaluations = [
        line["eval_loss"]
        for line in map(json.loads, (out / "metrics.jsonl").open())
        if "eval_loss" in line
    ]
    seconds = time.monotonic() - began
    return Row(method, record["trainable_parameters"], evaluations[0], evaluations[-1], seconds)
