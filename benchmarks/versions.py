"""Start, step and decomposition of this checkout beside another one, in turns: medians and ratios.

git worktree add /tmp/before COMMIT
python benchmarks/versions.py /tmp/before/src [--rounds 5] [--method pissa] [--hidden 1024]

Each round runs both checkouts, one after the other, each in a process of its own that imports only
its own package. A process measures every figure several times and reports the least, since what
else the machine does only adds; the table has the median over the rounds, and the median of the
rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[1] / "src"
ONE = """
import json, shutil, sys, time, torch, transformers, pissa
from pathlib import Path

torch.set_num_threads(2)
base, method = Path(sys.argv[1]), sys.argv[2]
load = transformers.AutoModelForCausalLM.from_pretrained

def seconds(work, repeats):
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])

def attach():
    model = load(base, dtype=torch.float32)
    began = time.perf_counter()
    attached = pissa.attach(model, method, 16)
    return time.perf_counter() - began, attached

starts = [attach()[0] for _ in range(6)][1:]
_, model = attach()
tokens = torch.randint(0, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=1e-5)

def step():
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

def decompose():
    pissa.decompose(base, base.parent / "out", method, 16, force=True)

print(json.dumps({
    "start": min(starts), "step": seconds(step, 30), "decompose": seconds(decompose, 4),
}))
"""


def measured(source: Path, base: Path, method: str) -> dict[str, float]:
    """Seconds of each figure with the package in this folder."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", ONE, str(base), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--method", default="pissa")
    parser.add_argument("--hidden", type=int, default=1024)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=3 * options.hidden,
            num_hidden_layers=3,
            num_attention_heads=8,
            vocab_size=1024,
        )
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
        rounds = []
        for number in range(options.rounds):
            both = {"other": options.other, "this": HERE}
            order = list(both) if number % 2 else list(both)[::-1]
            rounds.append({name: measured(both[name], base, options.method) for name in order})
    for figure in rounds[0]["this"]:
        other, this = (median(one[name][figure] for one in rounds) for name in ("other", "this"))
        ratio = median(one["this"][figure] / one["other"][figure] for one in rounds)
        print(f"{figure:10} other {other:.4f} s   this {this:.4f} s   ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
