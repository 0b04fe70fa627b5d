"""The memory that decomposing takes is that of one tensor, not of the model (issue 2, "Done when" 7)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from pissa.checkpoint.writer import CheckpointWriter

pytestmark = pytest.mark.slow

FREE_BYTES = 25 * 10**9
LIMIT_BYTES = 1.5 * 2**30
SHARD_BYTES = 500 * 10**6
LAYERS = {"2 GB": 17, "4 GB": 37, "8 GB": 77}

DECOMPOSE = """
import json, statistics, sys, threading, time

seen, done = [], threading.Event()

def watch():
    while not done.wait(0.02):
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                seen.append(1024 * int(line.split()[1]))

watcher = threading.Thread(target=watch)
watcher.start()
import pissa
began = time.monotonic()
try:
    record = pissa.decompose(sys.argv[1], sys.argv[2], sys.argv[3], rank=16, max_shard_bytes="500MB")
finally:
    done.set()
    watcher.join()
figures = {"peak": max(seen), "median": statistics.median(seen), "layers": len(record.layers)}
print(json.dumps({**figures, "seconds": time.monotonic() - began}))
"""


def write_llama(folder: Path, layers: int) -> int:
    """Write an untied bf16 Llama of 2048 columns shard by shard; the bytes of its tensors."""
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
    # Every tensor is a window on one pool of noise: drawing 12 GB of it would take longer than the
    # decomposition.
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(largest + len(shapes), dtype=torch.bfloat16).normal_(
        0, 0.02, generator=generator
    )
    with CheckpointWriter(
        folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()}, SHARD_BYTES
    ) as out:
        config.save_pretrained(folder)
        for offset, (name, shape) in enumerate(shapes.items()):
            out.write(name, pool[offset : offset + torch.Size(shape).numel()].view(shape))
    return 2 * sum(torch.Size(shape).numel() for shape in shapes.values())


def measure(tmp_path: Path, name: str, method: str = "pissa") -> dict[str, float]:
    source, out = tmp_path / "base", tmp_path / "out"
    total = write_llama(source, LAYERS[name])
    assert (source / "model.safetensors.index.json").is_file()
    assert total == pytest.approx(float(name.split()[0]) * 1e9, rel=0.06)
    try:
        done = subprocess.run(
            [sys.executable, "-c", DECOMPOSE, source, out, method],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["layers"] == 7 * LAYERS[name]
        assert (
            max(shard.stat().st_size for shard in out.glob("*.safetensors")) < SHARD_BYTES + 10**6
        )
    finally:
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)
    peak, usual = found["peak"] / 2**20, found["median"] / 2**20
    print(
        f"{name} {method}: RssAnon peak {peak:.0f} MiB, median {usual:.0f} MiB, {found['seconds']:.0f} s"
    )
    return found


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc"
)
def test_peak_memory_is_below_1_5_gib_and_does_not_grow_with_the_model(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    if free < FREE_BYTES:
        pytest.skip(f"{free / 1e9:.0f} GB free at {tmp_path}, needs {FREE_BYTES / 1e9:.0f}")
    four, eight = (measure(tmp_path, name) for name in ("4 GB", "8 GB"))
    assert four["peak"] <= LIMIT_BYTES
    assert eight["peak"] <= LIMIT_BYTES
    # The peak is a matter of chance, what was held at once for a moment: it differs by a tenth from
    # run to run.
    assert eight["median"] <= 1.1 * four["median"]


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc"
)
def test_peak_memory_in_4_bits_is_below_1_5_gib(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < FREE_BYTES:
        pytest.skip(f"less than {FREE_BYTES / 1e9:.0f} GB free at {tmp_path}")
    # 4 GB takes as much, and twice the time
    assert measure(tmp_path, "2 GB", "qpissa")["peak"] <= LIMIT_BYTES
