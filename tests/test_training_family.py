"""Claims about training the family: what is observed first, what a schedule closes, resumption to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pissa
from conftest import PACKABLE
from pissa.adapters import exact
from pissa.checkpoint.output import read_json
from pissa.errors import CheckpointError, ConfigError, InputError
from pissa.training import run, train
from pissa.training.calibration import calibrate, for_method
from pissa.training.closing import CloseLeft, closed
from pissa.training.folder import read_metrics
from test_training import Stopped, stop, train_up_to
from training_runs import STEPS, assert_same_run, save_tokenizer

Settings = Callable[..., Any]
FAMILY = ("lora_xs", "svft", "lamda", "lamda++", "corda", "eva", "lora_ga", "lora_pro")


def test_every_method_begins_at_the_base_and_learns(settings: Settings, tmp_path: Path) -> None:
    losses = {}
    for method in ("lora", *FAMILY):
        train(settings(method, method=method, calibration_rows=8))
        lines = read_metrics(tmp_path / method / "metrics.jsonl")
        losses[method] = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert {loss[0] for loss in losses.values()} == {losses["lora"][0]}
    assert all(loss[-1] < loss[0] - 0.005 for loss in losses.values()), losses


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora_xs", {}),
        ("svft", {"pattern": "banded", "width": 1}),
        ("lamda", {"eta": 0.9}),
        ("eva", {}),
        ("lora_pro", {}),
    ],
)
def test_a_broken_off_run_resumes_to_the_same_bits(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    options: dict[str, Any],
) -> None:
    change = {"method": method, "options": options, "weight_decay": 0.1, "calibration_rows": 8}
    train(settings("whole", **change))
    train_up_to(5, settings("broken", **change), monkeypatch)
    train(settings("broken", **change), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_checkpoint_of_a_core_without_its_exact_values_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_up_to(5, settings(method="lora_xs"), monkeypatch)
    (tmp_path / "out" / "checkpoints" / "checkpoint-4" / "cores.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cores.safetensors cannot be read"):
        train(settings(method="lora_xs"), resume=True)


def test_the_columns_of_lamda_close_one_after_another() -> None:
    counts = [closed(8, step, 100, 0.3) for step in range(101)]
    assert counts == sorted(counts)
    assert (counts[0], counts[15], counts[29], counts[30], counts[100]) == (0, 4, 7, 8, 8)


def test_a_closed_column_keeps_its_bits_under_momentum_and_decay(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[torch.Tensor]]] = []
    after = CloseLeft.on_optimizer_step

    def watch(self: CloseLeft, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after(self, args, state, control, **kwargs)
        seen.append((state.global_step, [left.detach().clone() for left in self.factors]))

    monkeypatch.setattr(CloseLeft, "on_optimizer_step", watch)
    train(settings(method="lamda", options={"eta": 0.5}, weight_decay=0.5, warmup_ratio=0))
    assert len(seen) == STEPS
    moving = []
    for (step, before), (_, now) in zip(
        [(-1, [torch.zeros_like(t) for t in seen[0][1]]), *seen], seen, strict=False
    ):
        count = closed(4, step + 1, STEPS, 0.5)
        assert all(
            torch.equal(old[:, :count], new[:, :count])
            for old, new in zip(before, now, strict=True)
        )
        moving.append(
            all(
                (old[:, count:] != new[:, count:]).any()
                for old, new in zip(before, now, strict=True)
            )
        )
    assert moving[:3] == [True] * 3 and not any(moving[3:])
    state = load_file(tmp_path / "out" / "state" / "state.safetensors")
    assert all(tensor.any() for name, tensor in state.items() if name.endswith("drift_core"))


def test_a_model_without_a_left_factor_to_close_is_refused(pico: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="attach lamda"):
        CloseLeft(pissa.attach(pico, "lora_xs", 4))


def test_a_run_says_what_it_was_calibrated_on(
    settings: Settings, words: Path, tmp_path: Path
) -> None:
    train(settings(method="corda", calibration_rows=8))
    facts = read_json(tmp_path / "out" / "state" / "pissa.json")["notes"]["observed"]
    assert facts["data"]["rows_read"] == 8
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(words.read_text().splitlines(keepends=True))))
    train(settings("other", method="corda", calibration_rows=8, calibration=str(other)))
    there = read_json(tmp_path / "other" / "state" / "pissa.json")["notes"]["observed"]
    assert there["data"]["sha256"] != facts["data"].get("sha256")
    one, two = (
        load_file(tmp_path / name / "state" / "state.safetensors") for name in ("out", "other")
    )
    assert any(not torch.equal(one[name], two[name]) for name in one if name.endswith("start_left"))


def test_one_pass_serves_many_methods(
    settings: Settings, base: Path, words: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "seen.safetensors"
    rows = {"fields": {}, "max_length": 32, "rank": 4}
    calibrate(str(base), str(words), 8, ["covariance", "gradient"], **rows).save(saved)
    for method in ("corda", "lora_ga"):
        train(settings(f"{method}-saved", method=method, calibration=str(saved)))
        train(settings(method, method=method, calibration_rows=8, eval_size=0, eval_steps=0))
        folders = (
            tmp_path / name / "state" / "state.safetensors" for name in (f"{method}-saved", method)
        )
        one, two = map(load_file, folders)
        starts = [name for name in one if ".start_" in name]
        assert starts and all(torch.allclose(one[name], two[name], atol=1e-4) for name in starts)
    with pytest.raises(InputError, match="not for components: observe that too"):
        train(settings("eva", method="eva", calibration=str(saved)))


def test_calibration_is_refused_where_weights_suffice(
    settings: Settings, words: Path, base: Path
) -> None:
    with pytest.raises(ConfigError, match="calibration: got .* expected null with pissa"):
        train(settings(calibration=str(words)))
    with pytest.raises(InputError, match="pissa needs the weights alone"):
        for_method(str(base), "pissa", str(words), 8)
    with pytest.raises(
        InputError, match="corda needs the covariance of each layer: give --calibration"
    ):
        for_method(str(base), "corda", None, 8)


def test_a_quantised_base_is_observed_before_it_is_quantised(
    settings: Settings, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = pico_folder("packable", vocab_size=260, **PACKABLE)
    save_tokenizer(folder)
    train(settings(method="corda", quant="nf4", calibration_rows=8, model=str(folder)))
    record = read_json(tmp_path / "out" / "residual" / "pissa.json")
    assert record["notes"]["observed"]["data"]["rows_read"] == 8
    assert record["recipe"]["options"]["mode"] == "ipm"


def test_wrong_options_are_told_with_all_other_mistakes(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="2 mistakes(.|\n)*no option 'modus'(.|\n)*old_data: got"):
        train(
            settings(
                method="corda",
                options={"modus": "kpm"},
                old_data="x",
                task="classification",
                eval_size=4,
            )
        )


def test_dropout_is_refused_around_a_core(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="dropout: got 0.1, expected 0 with lora_xs"):
        train(settings(method="lora_xs", dropout=0.1))


def test_parameters_of_cores_are_found_by_name(pico: torch.nn.Module) -> None:
    model = pissa.attach(pico, "lamda", 4)
    found = exact.parameters(model)
    assert len(found) == 2 * 14 and {
        tuple(part.shape) for name, part in found.items() if ".core." in name
    } == {(4, 4)}


@pytest.mark.parametrize("method", ["lora_xs", "lamda"])
def test_a_run_broken_off_after_its_last_checkpoint_ends_with_the_same_bits(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    train(settings("whole", method=method))
    with monkeypatch.context() as patch:
        patch.setattr(run, "_save", stop)
        with pytest.raises(Stopped):
            train(settings("broken", method=method))
    train(settings("broken", method=method), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_killed_before_it_had_a_start_observes_again(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"method": "corda", "calibration_rows": 8}
    train(settings("whole", **own))
    with monkeypatch.context() as patch:
        patch.setattr(run.runs, "save", stop)
        with pytest.raises(Stopped):
            train(settings("broken", **own))
    train(settings("broken", **own), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_model_that_need_not_be_observed_is_loaded_once(
    settings: Settings, pico_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pico_folder("packable", vocab_size=260, **PACKABLE)
    save_tokenizer(folder)
    loaded: list[str] = []
    load = run.language.load_model

    def watched(settings: Any, *args: Any) -> Any:
        loaded.append(Path(settings.model).name)
        return load(settings, *args)

    monkeypatch.setattr(run.language, "load_model", watched)
    train(settings(method="qpissa", model=str(folder)))
    assert loaded == ["residual"]


def test_a_run_from_before_there_were_options_goes_on(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_up_to(5, settings(), monkeypatch)
    record = read_json(tmp_path / "out" / "run.json")
    for key in ("options", "calibration", "calibration_rows"):
        del record["settings"][key]
    (tmp_path / "out" / "run.json").write_text(json.dumps(record))
    assert train(settings(), resume=True)["status"] == "finished"


def test_options_are_checked_before_anything_is_written(settings: Settings, tmp_path: Path) -> None:
    for method, options, message in (
        ("lamda", {"eta": 7}, "eta is 7"),
        ("lora_pro", {"cap": -1}, "cap is -1"),
        ("svft", {"width": 2.9}, "width is 2.9, expected a whole number"),
    ):
        with pytest.raises((ConfigError, InputError), match=message):
            train(settings(method=method, options=options))
        assert not (tmp_path / "out" / "state").exists()
