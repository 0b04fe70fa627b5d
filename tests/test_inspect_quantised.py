"""What `inspect` says of quantised residuals and what belongs to them, and their errors by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import pissa
from conftest import PACKABLE
from pissa.checkpoint.reader import Checkpoint
from pissa.cli.main import app
from pissa.errors import InputError, WrongBaseError
from pissa.quant import quantiser
from pissa.reports import plot_errors
from pissa.surgery.packing import PackedWeights
from runs import language_model, train
from training_runs import save_tokenizer

TYPES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", "all"]


@pytest.fixture
def base(pico_folder: Callable[..., Path]) -> Path:
    folder = pico_folder(vocab_size=260, **PACKABLE)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def residual(base: Path, tmp_path: Path) -> Path:
    pissa.decompose(base, tmp_path / "out", "qpissa", 4)
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(
        "A text of sixty four letters and more, so that all layers see it. " * 2, encoding="utf-8"
    )
    return file


def test_what_belongs_to_a_quantised_residual_says_so(
    base: Path, residual: Path, tmp_path: Path
) -> None:
    pissa.save(train(pissa.load(language_model(residual), residual)), tmp_path / "run")
    kinds = {
        "out": ("decomposed", "only both together"),
        "out/pissa_init": ("init", "no: only right beside that"),
        "run": ("run", f"serve its adapter/ on {residual}"),
        "run/state": ("state", "no: serve"),
        "run/adapter": ("lora", f"only on {residual}, not on the original base"),
    }
    for name, (kind, safe) in kinds.items():
        report = pissa.inspect(tmp_path / name)
        assert report.kind == kind
        assert "in nf4" in report.what
        assert safe in report.safe_to_serve
        assert report.base["name"] == str(base)
        assert (report.recipe["quant"], report.recipe["iterations"]) == ("nf4", 5)
    for name in ("run", "run/state", "run/adapter"):
        assert pissa.inspect(tmp_path / name, residual).base_check == "same"
    assert pissa.inspect(tmp_path / "run", base).base_check == "same"
    assert "was made for the residual" in pissa.inspect(tmp_path / "run/adapter", base).base_check


def test_the_errors_are_those_of_the_files(base: Path, residual: Path) -> None:
    rows = pissa.inspect(residual, errors=True).errors
    assert [row["type"] for row in rows] == TYPES
    assert [row["weights"] for row in rows] == [2] * 7 + [14]
    weights, packed = (
        load_file(base / "model.safetensors"),
        PackedWeights(Checkpoint.open(residual)),
    )
    start = load_file(residual / "pissa_init" / "adapter_model.safetensors")
    sums: dict[str, list[float]] = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        weight = weights[f"{name}.weight"]
        left, right = (start[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        found = {
            "nf4": weight - quantiser("nf4").quantise(weight, weight.dtype).dense,
            "loftq": weight
            - pissa.split(weight, "loftq", 4, svd="fast", name=f"{name}.weight").rebuild(),
            "this": weight - packed.dense(f"{name}.weight") - left @ right,
            "weight": weight,
        }
        for form, error in found.items():
            values = torch.linalg.svdvals(error.double())
            sums.setdefault(form, []).append(float(values.square().sum()))
            sums.setdefault(f"{form} nuclear", []).append(float(values.sum()))
    errors = rows[TYPES.index("q_proj")]["errors"]
    for form in ("nf4", "loftq", "this"):
        frobenius = (sum(sums[form]) / sum(sums["weight"])) ** 0.5
        assert errors[form]["frobenius"] == pytest.approx(frobenius, rel=1e-3)
        nuclear = sum(sums[f"{form} nuclear"]) / sum(sums["weight nuclear"])
        assert errors[form]["nuclear"] == pytest.approx(nuclear, rel=1e-3)
    whole = rows[-1]["errors"]
    for norm in ("frobenius", "nuclear"):
        assert 0.01 < whole["this"][norm] < whole["loftq"][norm] < whole["nf4"][norm] < 0.2


def test_the_output_error_is_that_of_the_layers_on_the_text(
    base: Path, residual: Path, text: Path
) -> None:
    rows = pissa.inspect(residual, text=text, errors=True).errors
    model, inputs = language_model(base), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, given: inputs.append(given[0][0])
    )
    tokens = transformers.AutoTokenizer.from_pretrained(base)(
        text.read_text(), return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        for part in tokens.split(64, dim=1):  # the model's positions
            model(part)
    X = torch.cat(inputs)
    weight = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    one = pissa.decompose(
        base, residual.with_name("one"), "qpissa", 4, targets=["layers.0.self_attn.q_proj"]
    )
    assert len(one.layers) == 1
    row = pissa.inspect(residual.with_name("one"), text=text, errors=True).errors[0]
    error = weight - quantiser("nf4").quantise(weight, weight.dtype).dense
    expected = float((X @ error.T).norm() / (X @ weight.T).norm())
    assert row["errors"]["nf4"]["output"] == pytest.approx(expected, rel=1e-4)
    assert rows[-1]["errors"]["this"]["output"] < rows[-1]["errors"]["nf4"]["output"]


def test_weights_that_see_no_activations_have_no_output_error(
    pico_folder: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    base = pico_folder("untied", vocab_size=260, tie_word_embeddings=False, **PACKABLE)
    save_tokenizer(base)
    with pytest.warns(
        UserWarning,
        match="1 of 3 weights are quantised but written unpacked, `model.embed_tokens.weight`",
    ):
        pissa.decompose(base, tmp_path / "some", "qpissa", 4, targets=["embed_tokens", "q_proj"])
    result = CliRunner().invoke(
        app,
        [
            "inspect",
            str(tmp_path / "some"),
            "--text",
            str(text),
            "--plot",
            str(tmp_path / "some.png"),
        ],
    )
    assert result.exit_code == 0, result.output
    rows = {
        row["type"]: row["errors"]["this"]
        for row in pissa.inspect(tmp_path / "some", text=text).errors
    }
    assert "output" not in rows["embed_tokens"]
    assert rows["q_proj"]["output"] == rows["all"]["output"] > 0


def test_loftqs_own_folder_is_not_compared_with_itself(base: Path, tmp_path: Path) -> None:
    pissa.decompose(base, tmp_path / "loftq", "loftq", 4, store="16bit")
    rows = pissa.inspect(tmp_path / "loftq", errors=True).errors
    assert all(set(row["errors"]) == {"nf4", "this"} for row in rows)


def test_the_command_prints_a_table_json_and_a_picture(
    residual: Path, text: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "deep" / "errors.png"
    result = CliRunner().invoke(
        app, ["inspect", str(residual), "--text", str(text), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    for words in ("frobenius nf4", "output this", "q_proj", "all"):
        assert words.split()[0] in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, ["inspect", str(residual), "--errors", "--json"])
    assert [row["type"] for row in json.loads(result.stdout)["errors"]] == TYPES


def test_errors_are_refused_where_there_is_nothing_to_compare(
    base: Path, residual: Path, pico_folder: Callable[..., Path], tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "plain", rank=4)
    for folder in (base, tmp_path / "plain", residual / "pissa_init"):
        with pytest.raises(InputError, match="errors are those of a quantised residual"):
            pissa.inspect(folder, errors=True)
    with pytest.raises(WrongBaseError, match="was made for another base"):
        pissa.inspect(
            residual, pico_folder("other", seed=1, vocab_size=260, **PACKABLE), errors=True
        )
    with pytest.raises(InputError, match="is no folder here: name it with --base"):
        pissa.inspect(residual, "org/absent", errors=True)
    (tmp_path / "short.txt").write_text("few")
    with pytest.raises(InputError, match="has 3 tokens, expected 16 or more"):
        pissa.inspect(residual, text=tmp_path / "short.txt", errors=True)
    with pytest.raises(InputError, match="cannot be read"):
        pissa.inspect(residual, text=tmp_path / "absent.txt", errors=True)
    with pytest.raises(InputError, match="no errors to draw"):
        plot_errors([], tmp_path / "none.png")


def test_the_residual_stored_in_16_bits_is_told_like_the_packed_one(
    base: Path, residual: Path, tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "wide", "qpissa", 4, store="16bit")
    packed, wide = (pissa.inspect(folder, errors=True) for folder in (residual, tmp_path / "wide"))
    assert packed.errors == wide.errors
