"""QLoRA, LoftQ and QPiSSA at equal settings and several seeds: evaluation loss at the start and at
the end.

python benchmarks/quantised_training.py MODEL --data train.jsonl --eval-data test.jsonl [--eval-rows
200] [--steps 80]

The first line is the base in 16 bits or more, at step 0. Losses are nats per token of the
responses.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

import pissa
from pissa.config import load_settings
from pissa.training.quiet import quiet

PRESETS = ("qlora", "loftq", "qpissa")


def evaluations(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet():
        rows = Path(options.eval_data).read_text(encoding="utf-8").splitlines()[: options.eval_rows]
        held_out = Path(folder, "eval.jsonl")
        held_out.write_text("\n".join(rows) + "\n", encoding="utf-8")

        def run(method: str, seed: int, steps: int) -> list[float]:
            out = Path(folder, f"{method}-{seed}")
            settings = {
                "model": options.model,
                "method": method,
                "rank": options.rank,
                "data": options.data,
                "eval_data": str(held_out),
                "max_steps": steps,
                "batch_size": options.batch_size,
                "max_length": options.max_length,
                "learning_rate": options.learning_rate,
                "save_steps": 0,
                "seed": seed,
                "output": str(out),
            }
            pissa.train(load_settings(None, settings))
            return evaluations(out)

        base = run("lora", 0, 1)[0]
        print(f"{'base, not quantised':20} start {base:.4f}", flush=True)
        rows_out = []
        for method in PRESETS:
            losses = [
                run(method, seed, options.steps) for seed in map(int, options.seeds.split(","))
            ]
            starts, ends = [loss[0] for loss in losses], [loss[-1] for loss in losses]
            rows_out.append({"method": method, "starts": starts, "ends": ends})
            each = " ".join(f"{end:.4f}" for end in ends)
            print(f"{method:20} start {mean(starts):.4f} end {mean(ends):.4f} ({each})", flush=True)
    print(json.dumps({"settings": vars(options), "base": base, "rows": rows_out}))


if __name__ == "__main__":
    main()
