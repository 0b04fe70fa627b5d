"""What a processor and a GPU agree on: starts, quantised bits, losses, resumption, answers. Needs a CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import pissa
from conftest import PACKABLE, TOKENS, build_pico
from eval_helpers import ask, gsm8k, moved_run, samples, speaker
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.linalg import truncated_svd
from pissa.training import train
from pissa.training.folder import read_metrics
from runs import error_of, gap, language_model, logits, stock_logits
from spectra import spectrum, with_values
from test_family import TRAINABLE, trained
from test_training import train_up_to
from training_runs import assert_same_run, save_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Settings = Callable[..., Any]
DEVICES = {"here": "cpu", "there": "cuda"}


def losses(run: Path) -> list[float]:
    """Every loss that a run wrote, of training and of evaluation, in order."""
    return [
        line[key]
        for line in read_metrics(run / "metrics.jsonl")
        for key in ("loss", "eval_loss")
        if key in line
    ]


@torch.no_grad()
def logits_there(model: torch.nn.Module) -> torch.Tensor:
    """Of a model on the device."""
    return model(input_ids=TOKENS.to(DEVICES["there"])).logits.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(384, 256), (200, 700)])
def test_the_fast_svd_finds_the_singular_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = with_values(spectrum("language", min(shape), generator), *shape, generator).to(dtype)
    found = truncated_svd(weight.to(DEVICES["there"]), 16, "fast", name="w")
    expected = torch.linalg.svdvals(weight.double())[:16]
    assert found.S.device.type == DEVICES["there"]
    assert (found.S.cpu().double() / expected - 1).abs().max() < 1e-3


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_decompose_gives_the_model_that_a_processor_gives(
    quant: str | None, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = pico_folder(**PACKABLE)
    for place, device in DEVICES.items():
        pissa.decompose(
            base,
            tmp_path / place,
            rank=4,
            quant=quant,
            device=device,
            iterations=2 if quant else None,
        )
    one, two = (
        logits_there(
            pissa.load(language_model(tmp_path / place), tmp_path / place).to(DEVICES["there"])
        )
        for place in DEVICES
    )
    assert error_of(two, one) < (0.02 if quant else 1e-5)
    if quant:  # a rounding of the last bit moves a few codes, not many
        codes = [Checkpoint.open(tmp_path / place) for place in DEVICES]
        name = next(
            name
            for name, info in codes[0].tensors.items()
            if info.dtype in (torch.uint8, torch.int8)
        )
        assert (codes[0].read(name) == codes[1].read(name)).float().mean() > 0.9


@pytest.mark.parametrize("method", ["full", *TRAINABLE])
def test_training_loses_what_it_loses_on_a_processor(
    method: str, settings: Settings, tmp_path: Path
) -> None:
    for place, device in DEVICES.items():
        train(settings(place, method=method, device=device, calibration_rows=8, logging_steps=1))
    one, two = (losses(tmp_path / place) for place in DEVICES)
    assert two == pytest.approx(one, rel=2e-3)
    assert two[-1] < two[0]


@pytest.mark.parametrize("method", ["pissa", "lora_xs", "eva"])
def test_what_was_trained_there_is_the_same_model_in_stock_tools(
    method: str, settings: Settings, base: Path, tmp_path: Path
) -> None:
    train(settings(method=method, calibration_rows=8, device=DEVICES["there"]))
    with_state = logits(pissa.load(language_model(base), tmp_path / "out"))
    on_device = pissa.load(language_model(base).to(DEVICES["there"]), tmp_path / "out")
    assert gap(logits_there(on_device), with_state) < 1e-4
    pissa.convert(tmp_path / "out", tmp_path / "lora")
    assert gap(stock_logits(base, tmp_path / "lora"), with_state) < 1e-4


@pytest.mark.parametrize(
    "change", [{}, {"bf16": True}, {"method": "qpissa"}, {"method": "lora_pro"}]
)
def test_a_broken_off_run_resumes_to_the_same_bits(
    change: dict[str, Any],
    settings: Settings,
    pico_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = pico_folder("packable", vocab_size=260, **PACKABLE)
    save_tokenizer(model)
    there = {"model": str(model), "device": DEVICES["there"], **change}
    train(settings("whole", **there))
    train_up_to(5, settings("broken", **there), monkeypatch)
    train(settings("broken", **there), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
def test_a_run_on_four_bits_is_loaded_and_merged_alike(
    method: str, settings: Settings, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = pico_folder("packable", vocab_size=260, **PACKABLE)
    save_tokenizer(model)
    train(settings(method=method, model=str(model), device=DEVICES["there"]))
    residual = next(
        path for path in (tmp_path / "out" / "residual", model) if (path / "config.json").is_file()
    )
    run = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(residual, device_map=DEVICES["there"]),
        tmp_path / "out" / "adapter",
    )
    pissa.merge(residual, tmp_path / "out", tmp_path / "merged", dtype="float32")
    assert error_of(logits(language_model(tmp_path / "merged")), logits_there(run.eval())) < 1e-2


def test_answers_and_their_likelihoods_are_those_of_a_processor(tmp_path: Path) -> None:
    base, data = speaker(tmp_path / "base"), gsm8k(tmp_path / "data")
    run = moved_run(base, tmp_path / "run")
    for place, device in DEVICES.items():
        ask([run], tmp_path / place, data, device=device, base_row=True)
    for model in ("base", "run"):
        one, two = (samples(tmp_path / place, model) for place in DEVICES)
        assert [row["output"] for row in two] == [row["output"] for row in one]
        gold = [
            read_json(tmp_path / place / model / "gsm8k.json")["gold"]["value"] for place in DEVICES
        ]
        assert gold[1] == pytest.approx(gold[0], rel=1e-4)


@pytest.mark.parametrize("form", ["keep", "residual"])
@pytest.mark.parametrize("method", ["lora", "pissa", "olora", "lora_xs", "svft", "lamda"])
def test_a_model_stays_where_it_is_while_its_weights_are_split_there(
    method: str, form: str
) -> None:
    one, two = (
        pissa.attach(build_pico(), method, 4, base=form, device=device)
        for device in (None, DEVICES["there"])
    )
    assert {tensor.device.type for tensor in two.state_dict().values()} == {"cpu"}
    assert gap(logits(two), logits(one)) < 1e-5
    ends = [logits(trained(model)) for model in (one, two)]
    assert gap(*ends) < 0.05 * gap(ends[0], logits(build_pico()))
