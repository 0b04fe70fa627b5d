"""A training step and a start, PiSSA beside stock peft, in one process: medians and ratios.

python benchmarks/step.py [--repeats 5] [--hidden 512] [--rank 16] [--device cuda]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pissa


def seconds(work: Callable[[], object], repeats: int) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return median(times)


def step_of(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(
        [part for part in model.parameters() if part.requires_grad], lr=1e-5
    )

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=1024,
    )
    base = LlamaForCausalLM(config).to(options.device)
    tokens = torch.randint(0, 1024, (4, 256), device=options.device)

    def stock(start: str | bool) -> torch.nn.Module:
        lora = LoraConfig(
            r=options.rank,
            lora_alpha=options.rank,
            target_modules="all-linear",
            init_lora_weights=start,
        )
        return get_peft_model(copy.deepcopy(base), lora)

    def ours(svd: str = "fast") -> torch.nn.Module:
        return pissa.attach(copy.deepcopy(base), rank=options.rank, svd=svd)

    starts: dict[str, Callable[[], object]] = {
        "peft pissa": lambda: stock("pissa"),
        "peft pissa_niter_16": lambda: stock("pissa_niter_16"),
        "pissa exact": lambda: ours("exact"),
        "pissa fast": lambda: ours(),
    }
    rows = {f"start: {name}": seconds(work, options.repeats) for name, work in starts.items()}
    steps = {"peft lora": step_of(stock(True), tokens), "pissa keep": step_of(ours(), tokens)}
    for work in steps.values():
        work()
    rows |= {f"step: {name}": seconds(work, 3 * options.repeats) for name, work in steps.items()}
    for name, value in rows.items():
        print(f"{name:28} {value * 1000:9.1f} ms")
    ratio = rows["step: pissa keep"] / rows["step: peft lora"]
    print(f"{'step ratio':28} {ratio:9.3f}")
    print(
        json.dumps(
            {"hidden": options.hidden, "rank": options.rank, "seconds": rows, "step_ratio": ratio}
        )
    )


if __name__ == "__main__":
    main()
