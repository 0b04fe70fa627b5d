"""Short trainings through `pissa.train`: a tokenizer for pico models, a kill, and what two runs must share."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import yaml
from safetensors.torch import load_file

from pissa.training.folder import read_metrics

STEPS = 6
PROGRAM = """
import sys, torch
from pathlib import Path
from pissa.config import load_settings
from pissa.training import train

torch.set_num_threads(1)
train(load_settings(Path(sys.argv[1]), {}))
"""


def save_tokenizer(folder: Path) -> None:
    """One token a byte, for models of 260 tokens and more."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {letter: index + 1 for index, letter in enumerate(alphabet)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def kill_training(settings: Any, once: Path) -> None:
    """Train in another process and kill it as soon as a file is there."""
    file = Path(f"{settings.output}.yaml")
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not once.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert once.exists()


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """What a run trained."""
    file = out / "adapter" / "adapter_model.safetensors"
    return load_file(file if file.is_file() else out / "model" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights, same lines of metrics."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [
        [
            {k: v for k, v in line.items() if k != "seconds"}
            for line in read_metrics(out / "metrics.jsonl")
        ]
        for out in (one, other)
    ]
    assert lines[0] == lines[1]
