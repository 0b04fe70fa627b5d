"""`pissa decompose` of a whole checkpoint beside its engine alone, and beside peft's start on the
model in memory.

python benchmarks/decompose.py [--gigabytes 4] [--ranks 16,128] [--repeats 3] [--device cuda]
[--peft]

The checkpoint is a synthetic bf16 Llama of 2048 columns, made in a temporary folder. "engine" is
`truncated_svd` alone over the same weights, with the same workers, read from the page cache;
"command" is the whole command, from start to renamed folder, on a checkpoint in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command does

import torch
import transformers

from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.writer import CheckpointWriter
from pissa.linalg import truncated_svd
from pissa.surgery.pipeline import in_order

LAYER_PARAMETERS = 4 * 2048 * 2048 + 3 * 2048 * 5504


def write_llama(folder: Path, gigabytes: float) -> None:
    layers = round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / LAYER_PARAMETERS)
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=32000,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape)
            for name, p in transformers.LlamaForCausalLM(config).named_parameters()
        }
    # Every tensor is a window on one pool of noise, as drawing all would take longer than the
    # decomposition.
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(largest + len(shapes), dtype=torch.bfloat16).normal_(
        0, 0.02, generator=generator
    )
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with CheckpointWriter(folder, plan, 1_000_000_000) as out:
        config.save_pretrained(folder)
        for offset, (name, shape) in enumerate(shapes.items()):
            out.write(name, pool[offset : offset + torch.Size(shape).numel()].view(shape))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def engine(folder: Path, rank: int, device: str) -> None:
    checkpoint = Checkpoint.open(folder)
    names = [name for name in checkpoint.tensors if name.endswith("proj.weight")]

    def work(name: str) -> None:
        truncated_svd(checkpoint.read(name).to(device), rank, "fast", name=name)

    for _ in in_order(work, names):
        pass


def command(folder: Path, out: Path, rank: int, device: str) -> None:
    words = [
        sys.executable,
        "-m",
        "pissa",
        "decompose",
        folder,
        out,
        "--rank",
        rank,
        "--device",
        device,
        "--force",
    ]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)


def peft_start(folder: Path, rank: int, device: str) -> float:
    """Seconds that peft takes to start a model that is in memory already."""
    from peft import LoraConfig, get_peft_model

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(
        device
    )
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights="pissa_niter_16"
    )
    return seconds(lambda: get_peft_model(model, config))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", default="16,128")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--peft",
        action="store_true",
        help="also peft's pissa_niter_16, once: needs the model in memory",
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary, "base"), Path(temporary, "out")
        write_llama(source, options.gigabytes)
        for rank in map(int, options.ranks.split(",")):
            times: dict[str, list[float]] = {"engine": [], "command": []}
            for _ in range(options.repeats):
                times["engine"].append(seconds(lambda r=rank: engine(source, r, options.device)))
                times["command"].append(
                    seconds(lambda r=rank: command(source, out, r, options.device))
                )
                shutil.rmtree(out)
            row = {
                "gigabytes": options.gigabytes,
                "rank": rank,
                **{name: median(t) for name, t in times.items()},
            }
            row["ratio"] = row["command"] / row["engine"]
            if options.peft:
                row["peft_niter_16"] = peft_start(source, rank, options.device)
            rows.append(row)
            print("  ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
