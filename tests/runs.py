"""Short real trainings, and what they are compared with: logits in memory and from folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import pissa
from conftest import TOKENS


def train(model: nn.Module, steps: int = 5, learning_rate: float = 1e-2) -> nn.Module:
    """A few AdamW steps on fixed tokens; classification models get fixed labels."""
    classifies = type(model.get_base_model()).__name__.endswith("ForSequenceClassification")
    labels = torch.tensor([0, 1]) if classifies else TOKENS
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=learning_rate
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def make_run(
    base: Path, run: Path, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> Tensor:
    """Attach to a language model on disk, train, save; returns the trained logits."""
    settings = {"rank": 4, **settings}
    model = train(pissa.attach(language_model(base, dtype=dtype), **settings))
    pissa.save(model, run)
    return logits(model)


def language_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def stock_logits(
    base: Path, adapter: Path, load: Callable[[Path], nn.Module] = language_model
) -> Tensor:
    """Logits of a stock peft adapter on a base."""
    return logits(peft.PeftModel.from_pretrained(load(base), adapter).eval())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one.double() - other.double()).abs().max())


def error_of(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference relative to the expected, in float64."""
    return float(
        torch.linalg.vector_norm((got - expected).double())
        / torch.linalg.vector_norm(expected.double())
    )
