"""What `pissa plan` says before a run, against the run itself; full-size models from their config alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trl.trainer.utils import add_fused_lm_head

import pissa
from conftest import PACKABLE
from pissa.config import load_settings
from pissa.errors import CheckpointError, ConfigError, InputError
from pissa.planning import Plan, plan, step
from pissa.planning.model import build
from pissa.planning.source import open_source
from pissa.planning.step import _Counter, step_bytes
from pissa.presets import choose
from pissa.training import train
from test_cli import run
from training_runs import save_tokenizer

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
"""config.json of meta-llama/Llama-2-7b-hf."""
SHORT = {"max_steps": 1, "eval_size": 0, "eval_steps": 0, "save_steps": 0}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_7B), encoding="utf-8")
    return folder


def weights_on_disk(out: Path) -> int:
    return sum(
        path.stat().st_size for path in out.rglob("*") if path.suffix in (".safetensors", ".pt")
    )


@pytest.mark.parametrize(
    "more",
    [
        {"method": "full"},
        {"method": "lora", "modules_to_save": ["embed_tokens"], "dropout": 0.1},
        {"method": "pissa", "targets": "q_proj,down_proj", "save_steps": 1, "max_steps": 2},
        {"method": "pissa", "base": "residual"},
        {"method": "lora_xs"},
        {"method": "svft", "options": {"pattern": "banded", "width": 2}},
        {"method": "lamda"},
        {"method": "lora_pro"},
        {"method": "qlora", "double_quant": True},
        {"method": "qpissa"},
        {"method": "loftq", "quant": "int8", "modules_to_save": ["norm"]},
    ],
    ids=lambda more: "-".join(map(str, more.values())),
)
def test_a_run_trains_as_many_parameters_as_planned_and_takes_the_room_planned(
    more: dict[str, Any],
    settings: Callable[..., Any],
    pico_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    base = pico_folder("packable", vocab_size=260, tie_word_embeddings=False, **PACKABLE)
    save_tokenizer(base)
    asked = settings(**{**SHORT, "model": str(base), **more})
    planned = plan(asked)
    record = train(asked)
    assert planned.asked.trainable == record["trainable_parameters"]
    assert planned.counts.rows == record["data"]["train_rows"]
    assert planned.asked.disk is not None
    # What is left over are the headers of files, and the optimiser's pickle around its numbers.
    assert 0 < weights_on_disk(tmp_path / "out") - most_on_disk(planned, more) < 150_000


def most_on_disk(planned: Plan, more: dict[str, Any]) -> int:
    """One checkpoint is in the plan beyond those kept, for the moment in which two lie there."""
    disk = planned.asked.disk
    assert disk is not None and disk.checkpoints == more.get("max_steps", 1)
    return disk.total


@pytest.mark.parametrize(("task", "labels"), [("classification", "abc"), ("regression", "147")])
def test_a_new_head_trains_whole_and_is_counted(
    task: str, labels: str, tmp_path: Path, minilm: Path
) -> None:
    data = tmp_path / "labels.csv"
    data.write_text(
        "text,label\n" + "".join(f"text {n},{labels[n % 3]}\n" for n in range(12)), encoding="utf-8"
    )
    values = {
        "model": str(minilm),
        "data": str(data),
        "output": str(tmp_path / "out"),
        "rank": 2,
        "batch_size": 4,
    }
    asked = load_settings(
        None, {**values, **SHORT, "task": task, "max_length": 16, "device": "cpu"}
    )
    planned = plan(asked)
    record = train(asked)
    assert planned.asked.trainable == record["trainable_parameters"]
    assert planned.costs[0].method == "full" and planned.costs[0].trainable > 20e6


@pytest.mark.parametrize(
    "more", [{"rows": 13, "epochs": 1.3}, {"rows": 9, "epochs": 1.0}, {"rows": 4, "epochs": 3.0}]
)
def test_steps_and_tokens_are_those_of_the_trainer(
    more: dict[str, Any], settings: Callable[..., Any], tmp_path: Path
) -> None:
    short = {
        "max_steps": 0,
        "eval_size": 0,
        "eval_steps": 0,
        "save_steps": 0,
        "method": "lora",
        "rank": 1,
    }
    asked = settings(
        **short, data_limit=more["rows"], epochs=more["epochs"], batch_size=4, micro_batch_size=2
    )
    planned = plan(asked)
    assert planned.counts.steps == train(asked)["steps"]
    assert planned.counts.tokens == pytest.approx(
        more["epochs"] * more["rows"] * planned.counts.row_tokens, abs=1
    )


@pytest.mark.parametrize("method", ["lora", "pissa", "full", "checkpointed"])
def test_a_step_without_values_takes_the_bytes_of_a_real_one(
    method: str, base: Path, tmp_path: Path
) -> None:
    values = {"model": str(base), "data": "none", "output": str(tmp_path / "out"), "rank": 4}
    name = "lora" if method == "checkpointed" else method
    asked = load_settings(None, {**values, "method": name})
    choice = None if name == "full" else choose(name)
    planned = build(open_source(load_settings(None, values)), asked, choice, 2)
    expected = step_bytes(
        planned, 2, 24, checkpointing=method == "checkpointed", accumulates=False, kind="cpu"
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base).train()
    if name != "full":
        model = pissa.attach(model, name, 4)
    inner = model.get_base_model() if name != "full" else model
    add_fused_lm_head(inner, outputs=("log_probs", "entropy", "is_top1"))
    if method == "checkpointed":
        inner.gradient_checkpointing_enable()
        inner.enable_input_require_grads()
    ids = torch.ones(2, 24, dtype=torch.long)
    with _Counter([*model.parameters(), *model.buffers()]) as counter:
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True
        )
        (-output.log_probs.sum()).backward()
    assert expected == pytest.approx(counter.peak, rel=0.05)
    tile = 4 * 2 * 23 * 32768  # of logits, so wide for any vocabulary
    assert expected - tile == pytest.approx(counter.peak - tile, rel=0.2)


def test_memory_that_is_let_go_counts_no_more_and_a_view_counts_nothing() -> None:
    with _Counter([]) as counter:
        first = torch.empty(100, device="meta")
        view = first[:50]
        del first, view
        torch.empty(80, device="meta")
    assert (counter.peak, counter.now) == (400, 0)


def test_llama_2_7b_is_planned_from_its_config_alone(llama: Path, tmp_path: Path) -> None:
    values = {
        "model": str(llama),
        "data": "org/absent",
        "output": str(tmp_path / "out"),
        "rank": 128,
    }
    asked = load_settings(
        None, {**values, "method": "qpissa", "gradient_checkpointing": True, "micro_batch_size": 1}
    )
    found = plan(asked, memory="24GB")
    full, lora, qlora, qpissa = found.costs
    assert full.parameters == full.trainable == 6_738_415_616  # as the model's card says
    # r (in + out) over q, k, v, o, gate, up, down of 32 layers
    assert (
        lora.trainable == qlora.trainable == qpissa.trainable == 128 * 32 * (4 * 8192 + 3 * 15104)
    )
    assert full.dtype == "bfloat16" and full.fits == "no" and qpissa.fits == "yes"
    assert full.device and lora.device and qlora.device and qpissa.device and qpissa.disk
    assert full.device.weights == pytest.approx(2 * 6_738_415_616, rel=1e-3)
    assert full.device.optimizer == 4 * 6_738_415_616
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    others = 6_738_415_616 - linear
    assert qlora.device.weights == pytest.approx(linear * (0.5 + 4 / 64) + 4 * others, rel=1e-3)
    assert qpissa.device.starts == qpissa.device.adapters == 4 * lora.trainable
    assert qpissa.disk.residual == pytest.approx(
        linear * (0.5 + 4 / 64) + 2 * others + 4 * lora.trainable, rel=1e-3
    )
    assert found.counts.steps is None and "data not here" in found.counts.note


def test_activations_grow_with_rows_and_shrink_with_checkpointing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the output layer's tile is all there is in a pico model
    monkeypatch.setattr(step, "TILE_COLUMNS", 64)
    values = {
        "model": str(base),
        "data": "org/absent",
        "output": str(tmp_path / "out"),
        "rank": 2,
        "max_length": 64,
    }

    def activations(**more: Any) -> int:
        device = plan(
            load_settings(None, {**values, "batch_size": 16, "method": "lora", **more})
        ).asked.device
        assert device is not None
        return device.activations

    assert activations(micro_batch_size=16) > 1.8 * activations(micro_batch_size=8)
    assert activations(micro_batch_size=16) > 1.05 * activations(
        micro_batch_size=16, gradient_checkpointing=True
    )


def test_a_decomposed_folder_is_planned_as_it_was_decomposed(
    settings: Callable[..., Any], base: Path, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "dec", "pissa", 3)
    found = plan(settings(model=str(tmp_path / "dec"), rank=3))
    assert [cost.method for cost in found.costs] == ["pissa"], (
        "no other method begins from a residual"
    )
    with pytest.raises(ConfigError, match="rank: got 4, expected 3"):
        plan(settings(model=str(tmp_path / "dec"), rank=4))
    packed = pico_folder("packable", vocab_size=260, **PACKABLE)
    pissa.decompose(packed, tmp_path / "few", "qpissa", 3)
    device = plan(settings(model=str(tmp_path / "few"), rank=3, method="qpissa")).asked.device
    plain = plan(settings(model=str(packed), rank=3, method="qpissa")).asked.device
    assert device == plain and device is not None and device.starts > 0


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "loftq", "pissa", "qpissa"])
def test_full_size_recipes_are_planned_offline(method: str, llama: Path, tmp_path: Path) -> None:
    recipe = Path(str(files("pissa.recipes") / f"math-{method}.yaml"))
    if not recipe.is_file():
        pytest.skip("this recipe is not there")
    asked = load_settings(recipe, {"model": str(llama), "output": str(tmp_path / "out")})
    settings = open_source(asked)
    choice = None if method == "full" else choose(asked.method, asked.quant)
    planned = build(settings, asked, choice, 2)
    assert sum(p.numel() for p in planned.trained) == (
        6_738_415_616 if method == "full" else 319_815_680
    )


def test_wrong_input_is_refused_as_training_would(
    settings: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="rank 40 is larger"):
        plan(settings(rank=40))
    with pytest.raises(ConfigError, match="unknown method"):
        plan(settings(method="pisa"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plan(settings(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="float16"):
        plan(settings(method="full", dtype="float16"))
    with pytest.raises(InputError, match="must be here"):
        plan(settings(data="org/absent"), measured=True)
    assert not (tmp_path / "out").exists(), "a plan writes nothing"


def test_the_command_says_what_fits_and_measures_time(
    base: Path, words: Path, tmp_path: Path
) -> None:
    flags = [
        "--model",
        base,
        "--data",
        words,
        "--output",
        tmp_path / "out",
        "--rank",
        2,
        "--batch_size",
        4,
    ]
    flags += ["--device", "cpu", "--max_length", 32, "--method", "lora"]
    done = run("plan", *flags, "--measure")
    assert done.returncode == 0, done.stderr
    assert "lora needs" in done.stdout and ": yes" in done.stdout and "tokens/s" in done.stdout
    assert "20 rows, 5 steps" in done.stdout
    found = json.loads(run("plan", *flags, "--json").stdout)
    assert found["costs"][-1]["device"]["total"] == sum(
        value for key, value in found["costs"][-1]["device"].items() if key != "total"
    )
    assert not (tmp_path / "out").exists()
    wrong = run("plan", *flags, "--learning_rte", 1)
    assert wrong.returncode == 2 and "learning_rate" in wrong.stderr
