"""The paper's claim at the size that two cores can train: stories260K on GSM8K, equal settings, three seeds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import pissa
from pissa.config import load_settings

SEEDS = (0, 1, 2)
SETTINGS = {
    "rank": 8,
    "max_steps": 80,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "max_length": 512,
    "save_steps": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def runs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gsm8k")
    with (shared / "data/gsm8k/test.jsonl").open() as lines, (root / "eval.jsonl").open("w") as out:
        out.writelines(line for line, _ in zip(lines, range(200), strict=False))
    for method in ("lora", "pissa"):
        for seed in SEEDS:
            paths = {
                "model": str(shared / "models/stories260K"),
                "data": str(shared / "data/gsm8k/train.jsonl"),
                "eval_data": str(root / "eval.jsonl"),
                "output": str(root / f"{method}-{seed}"),
            }
            pissa.train(load_settings(None, {**SETTINGS, **paths, "method": method, "seed": seed}))
    return root


def evaluations(run: Path) -> list[float]:
    return [
        line["eval_loss"]
        for line in map(json.loads, (run / "metrics.jsonl").open())
        if "eval_loss" in line
    ]


@pytest.mark.slow
def test_pissa_ends_below_lora_at_equal_settings(runs: Path) -> None:
    losses = {
        method: [evaluations(runs / f"{method}-{seed}") for seed in SEEDS]
        for method in ("lora", "pissa")
    }
    starts = {loss[0] for per_seed in losses.values() for loss in per_seed}
    assert len(starts) == 1, "both start at the base, bit for bit"
    ends = {method: [loss[-1] for loss in per_seed] for method, per_seed in losses.items()}
    print(f"\nevaluation loss: start {starts}, end {ends}")
    assert mean(ends["pissa"]) < mean(ends["lora"]) < starts.pop()


@pytest.mark.slow
def test_stock_peft_gives_the_trained_logits_on_the_original_base(runs: Path, shared: Path) -> None:
    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(
            shared / "models/stories260K", dtype=torch.float32
        )

    tokens = torch.arange(3, 403).reshape(2, 200)
    with torch.no_grad():
        start = base()(tokens).logits
        trained = pissa.load(base(), runs / "pissa-0", trainable=False)(tokens).logits
        stock = (
            PeftModel.from_pretrained(base(), str(runs / "pissa-0/adapter")).eval()(tokens).logits
        )
    print(
        f"\nmoved {float((trained - start).abs().max()):.3f}, stock off {float((stock - trained).abs().max()):.2e}"
    )
    assert (trained - start).abs().max() > 0.5
    assert (stock - trained).abs().max() < 1e-4


@pytest.mark.slow
def test_a_change_stored_in_bf16_keeps_its_precision(runs: Path) -> None:
    """Ours against the pair of peft's own conversion, [L, -L0] @ [R; R0], from the same run."""
    tensors = load_file(runs / "pissa-0/state/state.safetensors")
    modules = sorted(
        name.removesuffix(".start_left") for name in tensors if name.endswith(".start_left")
    )
    missed = {"drift form": 0.0, "difference form": 0.0}
    total = 0.0
    for module in modules:
        left0, right0, dL, dR = (
            tensors[f"{module}.{part}"].double()
            for part in ("start_left", "start_right", "drift_left", "drift_right")
        )
        left, right = left0 + dL, right0 + dR
        true = left @ right - left0 @ right0
        pairs = {
            "drift form": (torch.cat([left, dL], 1), torch.cat([dR, right0])),
            "difference form": (torch.cat([left, -left0], 1), torch.cat([right, right0])),
        }
        for form, (B, A) in pairs.items():
            stored = B.bfloat16().double() @ A.bfloat16().double()
            missed[form] += float((stored - true).square().sum())
        total += float(true.square().sum())
    errors = {form: (value / total) ** 0.5 for form, value in missed.items()}
    print(f"\nerror of the change stored in bf16: {errors}")
    assert errors["drift form"] < 0.005 < errors["difference form"]
