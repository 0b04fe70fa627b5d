"""What may happen during training: packing, autocast, kernels, early stopping, the bar, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import build_pico
from pissa.errors import ConfigError, MissingExtraError
from pissa.training import callbacks, train
from pissa.training.folder import read_metrics
from pissa.training.models import load_base
from pissa.training.packing import PackingCollator, check_rows_stay_apart
from runs import gap
from training_runs import assert_same_run, weights_of

SMALL = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
STOPPING = {"early_stopping": 2, "eval_steps": 1, "max_steps": 30, "learning_rate": 0.3}


def losses(out: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(out / "metrics.jsonl") if key in line]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train_as_the_same_rows_unpacked(
    attention: str, settings: Callable[..., Any], tmp_path: Path
) -> None:
    """16 rows a step in both runs: of 12 tokens at most, in 4 sequences of 64."""
    common = {"max_length": 64, "max_steps": 3, "eval_steps": 0, "attn_implementation": attention}
    train(settings("unpacked", batch_size=16, micro_batch_size=16, **common))
    record = train(settings("packed", batch_size=4, micro_batch_size=4, packing=True, **common))
    assert (
        record["steps"] == 3 and read_metrics(tmp_path / "packed/metrics.jsonl")[-1]["epoch"] == 3
    )
    for key in ("loss", "eval_loss"):
        assert losses(tmp_path / "packed", key) == pytest.approx(
            losses(tmp_path / "unpacked", key), abs=2e-6
        )
    packed, unpacked = weights_of(tmp_path / "packed"), weights_of(tmp_path / "unpacked")
    assert max(gap(packed[name], unpacked[name]) for name in packed) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_does_not_change_with_its_neighbours(attention: str) -> None:
    model = build_pico()
    model.set_attn_implementation(attention)
    outputs = []
    for first in ([3, 4, 5, 6], [9, 9, 9, 9]):
        row = {
            "input_ids": [*first, 20, 21, 22],
            "labels": [*first, 20, 21, 22],
            "seq_lengths": [4, 3],
        }
        batch = PackingCollator(0)([row, row])
        outputs.append(
            model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        )
    ours = [4, 5, 6, 11, 12, 13]
    assert torch.equal(outputs[0][0, ours], outputs[1][0, ours])
    assert gap(outputs[0], outputs[1]) > 0.01
    alone = model(input_ids=torch.tensor([[20, 21, 22]])).logits
    assert gap(outputs[0][0, 4:7], alone[0]) < 1e-6


@pytest.mark.parametrize(
    ("config", "apart"),
    [
        (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL), True),
        (transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL), False),
        (
            transformers.OPTConfig(
                hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                max_position_embeddings=64, **SMALL,
            ),
            False,
        ),
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL), False),
    ],
    ids=["gpt2", "bloom", "opt", "mamba"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_joins_packed_rows_is_refused(
    config: Any, apart: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if apart:
        check_rows_stay_apart(model)
    else:
        with pytest.raises(ConfigError, match="packed"):
            check_rows_stay_apart(model)


def test_autocast_computes_in_bfloat16_and_trains_in_float32(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    for name, options in (("before", {}), ("autocast", {"bf16": True}), ("after", {})):
        train(settings(name, max_steps=2, eval_steps=0, **options))
    assert losses(tmp_path / "autocast") != losses(tmp_path / "before")
    assert losses(tmp_path / "autocast") == pytest.approx(losses(tmp_path / "before"), abs=5e-3)
    assert_same_run(tmp_path / "before", tmp_path / "after")
    assert {part.dtype for part in weights_of(tmp_path / "autocast").values()} == {torch.float32}
    change = weights_of(tmp_path / "autocast")
    assert any(gap(part, part.bfloat16()) > 0 for part in change.values()), (
        "not rounded to bfloat16"
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_gets_the_attention_that_is_asked_for(
    attention: str, settings: Callable[..., Any]
) -> None:
    model, _ = load_base(settings(attn_implementation=attention), "AutoModelForCausalLM")
    assert model.config._attn_implementation == attention


def test_a_run_stops_when_the_loss_no_longer_falls_and_says_so(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    record = train(settings(**STOPPING))
    evaluated = losses(tmp_path / "out", "eval_loss")
    best = evaluated.index(min(evaluated))
    assert record["status"] == "finished"
    assert record["steps"] == best + 2 == len(evaluated) - 1 < 30
    assert (
        f"stopped at step {best + 2}" in record["stopped"]
        and f"at step {best}" in record["stopped"]
    )
    assert json.loads((tmp_path / "out/run.json").read_text())["stopped"] == record["stopped"]
    assert train(settings(**STOPPING), resume=True) == record


@pytest.mark.parametrize(
    "before_the_end", [1, 0], ids=["while it waits", "at the step at which it stops"]
)
def test_a_run_broken_off_before_it_stops_early_stops_at_the_same_step(
    before_the_end: int,
    settings: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = train(settings("whole", **STOPPING))
    whole_on_save = callbacks.Checkpoints.on_save

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole_on_save(self, args, state, control, **kwargs)
        if state.global_step == whole["steps"] - before_the_end:
            raise KeyboardInterrupt

    broken = settings("broken", **STOPPING, save_steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Checkpoints, "on_save", on_save)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    assert train(broken, resume=True)["stopped"] == whole["stopped"]
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_a_run_that_reaches_its_last_step_was_not_stopped(settings: Callable[..., Any]) -> None:
    record = train(settings(early_stopping=3, eval_steps=2))
    assert record["steps"] == 6 and record["stopped"] is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"packing": True, "task": "classification"},
            ConfigError,
            "packing: got true with classification",
        ),
        (
            {"early_stopping": 2, "eval_steps": 0},
            ConfigError,
            "early_stopping: got 2, expected beside it eval_steps",
        ),
        (
            {"early_stopping": 2, "eval_steps": 0, "eval_size": 0},
            ConfigError,
            "eval_data or eval_size",
        ),
        (
            {"attn_implementation": "flash_attention_2"},
            ConfigError,
            "expected sdpa or eager without a GPU",
        ),
        ({"report_to": "tensorbord"}, ConfigError, "Did you mean 'tensorboard'"),
        ({"report_to": ["comet_ml"]}, MissingExtraError, "pip install comet-ml"),
        ({"report_to": "trackio"}, MissingExtraError, "pip install trackio"),
        ({"liger": True}, MissingExtraError, "pip install liger-kernel"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    settings: Callable[..., Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        train(settings(**options))
    assert not (tmp_path / "out").exists()


def test_a_model_that_joins_packed_rows_is_refused_before_anything_is_written(
    settings: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, **{**SMALL, "vocab_size": 260}
    )
    transformers.BloomForCausalLM(config).save_pretrained(base)
    with pytest.raises(ConfigError, match="train on one another"):
        train(settings(packing=True))
    assert not (tmp_path / "out").exists()


def test_the_bar_shows_time_left_loss_rate_and_gradient(
    settings: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    record = train(settings(max_steps=2, eval_steps=0))
    shown = capsys.readouterr().err
    assert all(
        word in shown for word in ("2/2", "<00:0", f"loss={record['loss']:.4f}", "lr=", "grad=")
    )


def test_tensorboard_writes_into_the_runs_folder(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    train(settings(max_steps=2, eval_steps=0, report_to="tensorboard"))
    assert list((tmp_path / "out/tensorboard").glob("events.*"))
    train(settings(max_steps=2, eval_steps=0, force=True))
    assert not (tmp_path / "out/tensorboard").exists()
