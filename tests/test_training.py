"""Claims about runs: what they leave on disk, that a killed one ends with the same bits, that a head survives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import pissa
from pissa.config import load_settings
from pissa.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    OutputError,
    PissaError,
    WrongBaseError,
)
from pissa.reports import plot_losses
from pissa.training import callbacks, folder, run, train
from pissa.training.folder import checkpoints, newest_checkpoint, read_metrics
from training_runs import STEPS, assert_same_run, kill_training, save_tokenizer, weights_of


class Stopped(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stopped


def train_up_to(step: int, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and break off when `step` is logged, as a full disk or a person would break it off."""
    plain = callbacks.Metrics.on_log

    def on_log(
        self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        plain(self, args, state, control, logs, **kwargs)
        if state.global_step == step:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Metrics, "on_log", on_log)
        with pytest.raises(Stopped):
            train(settings)


def test_a_run_leaves_a_lora_that_stock_peft_loads(
    settings: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    record = train(settings())
    out = tmp_path / "out"
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 23)[None]
    before = plain(ids).logits
    tuned = peft.PeftModel.from_pretrained(plain, out / "adapter")
    assert (tuned(ids).logits - before).abs().max() > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(out / "adapter").eos_token == "</s>"
    assert record == json.loads((out / "run.json").read_text())
    assert (record["status"], record["steps"], record["data"]["train_rows"]) == (
        "finished",
        STEPS,
        16,
    )
    assert load_settings(out / "settings.yaml", {}) == settings()
    assert plot_losses({"pissa": out}, out / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_one_line_per_event(settings: Callable[..., Any], tmp_path: Path) -> None:
    train(settings())
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, 6], "the start too"
    assert all(line.keys() >= {"step", "epoch", "seconds"} for line in lines)
    assert all(line.keys() >= {"learning_rate", "grad_norm"} for line in lines if "loss" in line)


def test_first_loss_is_the_bases(settings: Callable[..., Any], tmp_path: Path) -> None:
    first = []
    for method in ("pissa", "lora", "full"):
        train(settings(method, method=method, max_steps=1, eval_steps=0))
        start, step = read_metrics(tmp_path / method / "metrics.jsonl")[:2]
        first.append((start["eval_loss"], step["loss"]))
    assert first[0] == first[1] == first[2]


def test_adapters_train_in_float32_on_a_bfloat16_base(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    losses = []
    for recompute in (False, True):
        output = f"recompute-{recompute}"
        train(
            settings(
                output,
                dtype="bfloat16",
                gradient_checkpointing=recompute,
                eval_size=0,
                eval_steps=0,
            )
        )
        assert {tensor.dtype for tensor in weights_of(tmp_path / output).values()} == {
            torch.float32
        }
        losses.append([line["loss"] for line in read_metrics(tmp_path / output / "metrics.jsonl")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "stop"),
    [
        ({}, 3),
        ({}, 5),
        ({}, 1),
        ({"method": "lora", "dropout": 0.1}, 5),
        ({"method": "full"}, 5),
        ({"base": "residual"}, 3),
    ],
    ids=[
        "mid-epoch",
        "second epoch",
        "before any checkpoint",
        "lora with dropout",
        "full",
        "residual",
    ],
)
def test_a_broken_off_run_resumes_to_the_same_bits(
    settings: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    stop: int,
) -> None:
    train(settings("whole", **change))
    train_up_to(stop, settings("broken", **change), monkeypatch)
    train(settings("broken", **change), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_broken_off_while_saving_ends_without_another_step(
    settings: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", stop)
        with pytest.raises(Stopped):
            train(settings("broken"))
    train(settings("broken"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_sigkill_and_resume_give_the_same_bits(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    train(settings("whole"))
    killed = settings("killed")
    kill_training(killed, once=tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "whole")
    train(killed, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_without_its_mark_is_not_used(tmp_path: Path) -> None:
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "whole").touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()


def test_old_checkpoints_are_deleted(settings: Callable[..., Any], tmp_path: Path) -> None:
    train(settings(save_total_limit=1))
    assert [path.name for path in checkpoints(tmp_path / "out" / "checkpoints")] == [
        f"checkpoint-{STEPS}"
    ]


@pytest.fixture
def broken(settings: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A run broken off at step 3; returns `settings`."""
    train_up_to(3, settings(), monkeypatch)
    return settings


def test_resuming_with_other_settings_lists_what_differs(broken: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        train(broken(learning_rate=1e-3, max_steps=9, logging_steps=2), resume=True)
    assert "learning_rate: got 0.001, expected 0.01" in str(caught.value)
    assert "max_steps: got 9, expected 6" in str(caught.value)
    assert "logging_steps" not in str(caught.value)


def test_resuming_with_other_data_is_refused(broken: Callable[..., Any], words: Path) -> None:
    words.write_text(words.read_text().replace("19", "91"))
    with pytest.raises(ConfigError, match="tokens_sha256"):
        train(broken(), resume=True)


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_resuming_on_another_base_names_the_tensor(
    settings: Callable[..., Any],
    pico_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    train_up_to(1, settings(method=method), monkeypatch)
    other = pico_folder("other", seed=1, vocab_size=260)
    save_tokenizer(other)
    with pytest.raises(WrongBaseError, match=r"`.*weight`"):
        train(settings(method=method, model=str(other)), resume=True)


def test_resuming_a_finished_run_does_nothing(
    settings: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = train(settings(max_steps=1))
    before = (tmp_path / "out" / "run.json").stat().st_mtime_ns
    assert train(settings(max_steps=1), resume=True) == record
    assert (tmp_path / "out" / "run.json").stat().st_mtime_ns == before
    assert "is finished" in caplog.text


def test_output_is_only_replaced_by_force_and_only_a_run(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    train(settings(max_steps=1))
    with pytest.raises(OutputError, match="--resume"):
        train(settings(max_steps=1))
    (tmp_path / "out" / "mine.txt").touch()
    assert train(settings(max_steps=2, force=True))["steps"] == 2
    assert (tmp_path / "out" / "mine.txt").exists()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").touch()
    with pytest.raises(OutputError, match="holds no run"):
        train(settings("foreign", force=True))


@pytest.mark.parametrize(
    ("change", "error", "claim"),
    [
        ({"method": "pisa"}, ConfigError, "Did you mean 'pissa'"),
        ({"dropout": 0.1}, ConfigError, "part of the weight itself"),
        ({"method": "full", "dropout": 0.1}, ConfigError, "no adapter"),
        ({"method": "full", "dtype": "float16"}, ConfigError, "float16"),
        ({"rank": 999}, PissaError, "999"),
        ({"targets": ["q_porj"]}, PissaError, "q_porj"),
        ({"targets": ["lm_head"]}, PissaError, "lm_head"),
        ({"fields": {"text": "absent"}}, DataError, "line 1"),
        ({"model": "no/such/model/here"}, PissaError, "no/such/model/here"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, PissaError, "smaller learning_rate"),
    ],
)
def test_a_mistake_is_one_clear_error(
    settings: Callable[..., Any], change: dict[str, Any], error: type[Exception], claim: str
) -> None:
    with pytest.raises(error) as caught:
        train(settings(**change))
    assert claim in str(caught.value)


def test_nothing_is_written_before_all_is_checked(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    for change in (
        {"rank": 999},
        {"targets": ["lm_head"]},
        {"fields": {"text": "absent"}},
        {"method": "pisa"},
    ):
        with pytest.raises(PissaError):
            train(settings(**change))
        assert not (tmp_path / "out").exists()


def test_pickled_weights_are_refused(settings: Callable[..., Any], base: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        train(settings())


def test_a_base_with_missing_weights_is_no_language_model(
    settings: Callable[..., Any], base: Path
) -> None:
    from safetensors.torch import save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        train(settings())


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    path = tmp_path / "moods.jsonl"
    rows = [{"text": f"{word} {n}", "label": word} for n in range(10) for word in ("good", "bad")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reloaded_classifier(base: Path, out: Path, record: dict[str, Any]) -> Any:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(record["labels"])
    )
    return peft.PeftModel.from_pretrained(plain, out / "adapter").eval()


def test_the_trained_head_survives_save_and_stock_reload(
    settings: Callable[..., Any],
    base: Path,
    moods: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = []
    save = run._save
    monkeypatch.setattr(
        run, "_save", lambda trainer, *rest: (kept.append(trainer.model), save(trainer, *rest))
    )
    record = train(settings(task="classification", data=str(moods), epochs=1))
    assert record["labels"] == ["bad", "good"]
    assert record.keys() >= {"eval_accuracy", "eval_f1"}
    ids = torch.arange(3, 23)[None]
    again = reloaded_classifier(base, tmp_path / "out", record)
    trained = kept[0].eval()
    assert trained.get_base_model().config.id2label == {0: "bad", 1: "good"}
    torch.testing.assert_close(again(ids).logits, trained(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_a_broken_off_classification_resumes_to_the_same_bits(
    settings: Callable[..., Any],
    moods: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    change = {"task": "classification", "data": str(moods), "method": method}
    train(settings("whole", **change))
    train_up_to(5, settings("broken", **change), monkeypatch)
    train(settings("broken", **change), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    assert any("score" in name for name in weights_of(tmp_path / "broken"))


def test_minilm_learns_scores_on_stsb(
    settings: Callable[..., Any], minilm: Path, shared: Path, tmp_path: Path
) -> None:
    change = {
        "model": str(minilm), "task": "regression", "data": str(shared / "data/glue/STS-B/train.tsv"), "max_steps": 4,
        "fields": {"label": "score"}, "data_limit": 40, "eval_size": 16, "eval_steps": 0, "learning_rate": 3e-3,
    }  # fmt: skip
    record = train(settings(**change))
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    assert record["eval_loss"] < lines[0]["eval_loss"]  # the head begins near 0, the scores go to 5
    assert -1 <= record["eval_pearson"] <= 1
    assert {"eval_pearson", "eval_spearman"} <= record.keys()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=1)
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "out/adapter")
    assert tuned(torch.arange(5, 15)[None]).logits.shape == (1, 1)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "label": "3.5"}\n{"text": "b", "label": "high"}\n')
    with pytest.raises(DataError, match=r"line 2: .*expected a number in label, got 'high'"):
        train(
            settings(
                "other",
                **{**change, "data": str(broken), "fields": {}, "data_limit": 0, "eval_size": 0},
            )
        )


def test_minilm_learns_on_mrpc(
    settings: Callable[..., Any], minilm: Path, shared: Path, tmp_path: Path
) -> None:
    record = train(
        settings(
            model=str(minilm),
            task="classification",
            data=str(shared / "data/glue/MRPC/train.tsv"),
            fields={"label": "Quality", "text": "#1 String", "text_pair": "#2 String"},
            data_limit=24,
            max_steps=2,
            eval_steps=0,
        )
    )
    assert record["labels"] == ["0", "1"]
    assert 0 <= record["eval_accuracy"] <= 1
    heads = [name for name in weights_of(tmp_path / "out") if "lora" not in name]
    assert sorted(name.rpartition(".")[2] for name in heads) == ["bias", "weight"]


def test_what_an_unfinished_training_left_is_no_adapter(
    settings: Callable[..., Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_up_to(3, settings("cut"), monkeypatch)
    out = tmp_path / "cut"
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    for use in (
        lambda: pissa.convert(out, tmp_path / "lora"),
        lambda: pissa.convert(out / "adapter", tmp_path / "lora"),
        lambda: pissa.merge(base, out, tmp_path / "merged"),
        lambda: pissa.load(model, out),
        lambda: pissa.load(model, out / "adapter"),
    ):
        with pytest.raises(CheckpointError, match=r"has not ended .*--resume"):
            use()
    assert not (tmp_path / "lora").exists()
    assert pissa.inspect(out / "adapter").safe_to_serve.startswith("no: ")
    train(settings("cut"), resume=True)
    pissa.convert(out, tmp_path / "lora")
    assert (
        pissa.inspect(out).safe_to_serve.startswith("yes")
        or "adapter/" in pissa.inspect(out).safe_to_serve
    )


def test_files_of_an_adapter_may_be_read_by_others(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    train(settings("out", max_steps=1, eval_size=0, eval_steps=0))
    modes = {
        file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out/adapter").iterdir()
    }
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_two_processes_never_train_into_one_folder(
    settings: Callable[..., Any], tmp_path: Path
) -> None:
    with (
        folder.held(tmp_path / "out"),
        pytest.raises(BusyError, match="another process is training"),
    ):
        train(settings("out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        train(settings("out", model=str(tmp_path / "nothing")))
    assert not (tmp_path / "out").exists()
