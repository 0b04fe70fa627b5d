"""Claims about nearness to a base: the figures are those of transformers by hand, and every form of a model is met."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import pissa
from conftest import PACKABLE, build_pico
from pissa.cli import eval as command
from pissa.errors import DataError, InputError, OutputError, WrongBaseError
from pissa.evaluation.fidelity import Fidelity, fidelity
from pissa.evaluation.windows import Compared, Row, compare, largest, mean, mean_row
from pissa.observe import observe
from pissa.training import train
from pissa.w4a4 import svdquant
from runs import language_model, make_run
from training_runs import save_tokenizer

LENGTH = 32


@dataclass(frozen=True)
class Trained:
    """A base, a run of it, and what the run was made into; measured together once."""

    base: Path
    run: Path
    merged: Path
    found: Fidelity


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 bytes, so 230 tokens: seven windows and a rest."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(
        "".join(chr(33 + (7 * n * n + 3 * n) % 90) for n in range(230)), encoding="utf-8"
    )
    return file


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    place = tmp_path_factory.mktemp("trained")
    base, run, merged, lora = (place / name for name in ("base", "run", "merged", "lora"))
    build_pico(vocab_size=260).save_pretrained(base)
    save_tokenizer(base)
    make_run(base, run)
    pissa.merge(base, run, merged)
    pissa.convert(run, lora)
    found = measure([run, merged, lora], text, output=place / "out")
    assert json.loads((place / "out" / "fidelity.json").read_text()) == found.to_json()
    return Trained(base, run, merged, found)


def steep(folder: Path, seed: int = 0) -> Path:
    """A base whose weights fit the format of few bits and have a steep spectrum."""
    model = build_pico(seed, vocab_size=260, **PACKABLE)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                U, S, Vh = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((U * torch.arange(1.0, len(S) + 1) ** -1.5) @ Vh)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def measure(models: list[Path], text: Path, **more: Any) -> Fidelity:
    return fidelity([str(path) for path in models], text, max_length=LENGTH, device="cpu", **more)


def only(models: list[Path], text: Path, **more: Any) -> Row:
    """The row of the one model."""
    base, row = measure(models, text, **more).rows
    assert base.kind == "base"
    return row


def near(row: Row) -> None:
    """Nothing but rounding lies between the model and its base."""
    assert 0 <= row.kl < 1e-8
    assert row.agreement == 1
    assert abs(row.ratio - 1) < 1e-5


def test_the_base_is_itself_and_so_is_a_copy(base: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    found = measure([base, tmp_path / "copy"], text, base=str(base))
    assert [row.kind for row in found.rows] == ["base", "model"]
    for row in found.rows:
        assert (row.difference, row.difference_stderr, row.kl, row.agreement, row.largest) == (
            0,
            0,
            0,
            1,
            0,
        )
        assert row.ratio == 1


def test_perplexity_and_divergence_are_those_of_transformers_by_hand(
    trained: Trained, text: Path
) -> None:
    row = next(row for row in trained.found.rows if row.kind == "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained.base)
    ids = tokenizer(text.read_text())["input_ids"]
    assert len(ids) == 230
    losses, divergences, agreed, largest = [], [], [], 0.0
    base, model = language_model(trained.base), language_model(trained.merged)
    for at in range(0, 230, LENGTH):
        window = torch.tensor([ids[at : at + LENGTH]])
        with torch.no_grad():
            ours = base(window).logits[0, :-1].double()
            theirs = model(window).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(theirs, window[0, 1:], reduction="none"))
        divergences.append(
            torch.distributions.kl_divergence(
                *(torch.distributions.Categorical(logits=x) for x in (ours, theirs))
            )
        )
        agreed.append(ours.argmax(-1) == theirs.argmax(-1))
        largest = max(largest, float((ours - theirs).abs().max()))
    assert row.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-6)
    assert row.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4, abs=1e-9)
    assert row.kl > 1e-4
    assert row.agreement == pytest.approx(float(torch.cat(agreed).double().mean()))
    assert row.largest == pytest.approx(largest, rel=1e-6)
    # Windows of one length: the usual error of a mean
    whole = torch.stack([loss.mean() for loss in losses[:7]])
    counts = [31] * 7
    assert mean((31 * whole).tolist(), counts)[1] == pytest.approx(
        float(whole.std() / math.sqrt(7)), rel=1e-6
    )


def test_the_difference_is_paired_by_window(trained: Trained) -> None:
    own, run, *_ = trained.found.rows
    assert run.difference == pytest.approx(run.loss - own.loss, abs=1e-9)
    assert run.ratio == pytest.approx(run.perplexity / own.perplexity, rel=1e-9)
    assert (
        run.difference_stderr is not None
        and own.loss_stderr is not None
        and run.loss_stderr is not None
    )
    assert 0 < run.difference_stderr < math.hypot(own.loss_stderr, run.loss_stderr)
    assert run.ratio_stderr == pytest.approx(run.ratio * run.difference_stderr)


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_decomposed_folder_in_32_bits_is_the_base(
    method: str, base: Path, text: Path, tmp_path: Path
) -> None:
    pissa.decompose(base, tmp_path / "split", method, 8)
    row = only([tmp_path / "split"], text)
    assert row.kind == "decomposed"
    near(row)


def test_in_few_bits_qpissa_is_nearer_than_qlora_on_a_steep_spectrum(
    text: Path, tmp_path: Path
) -> None:
    found: dict[str, list[float]] = {"qlora": [], "qpissa": []}
    for seed in range(2):
        base = steep(tmp_path / f"base{seed}", seed)
        for method, divergences in found.items():
            pissa.decompose(base, tmp_path / f"{method}{seed}", method, 16)
            row = only([tmp_path / f"{method}{seed}"], text)
            divergences.append(row.kl)
            assert row.kl > 1e-8
    assert sum(found["qpissa"]) < 0.5 * sum(found["qlora"])


def test_a_run_its_lora_and_its_merged_model_are_one_model(trained: Trained) -> None:
    _, run, *others = trained.found.rows
    assert [run.kind, *(row.kind for row in others)] == ["run", "run, converted", "merged", "lora"]
    assert run.kl > 1e-4
    for row in others:
        assert row.loss == pytest.approx(run.loss, abs=1e-5)
        assert row.kl == pytest.approx(run.kl, abs=1e-5)


def test_a_wrong_export_shows(trained: Trained, text: Path, tmp_path: Path) -> None:
    shutil.copytree(trained.run, tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file(
        {name: -tensor for name, tensor in load_file(weights).items() if "lora_B" in name}
        | {name: tensor for name, tensor in load_file(weights).items() if "lora_A" in name},
        weights,
    )
    _, run, converted = measure([tmp_path / "run"], text).rows
    assert run.loss == trained.found.rows[1].loss
    assert abs(run.loss - converted.loss) > 1e-3


def test_a_run_beside_a_residual_in_few_bits_is_compared_with_the_original(
    settings: Callable[..., Any], text: Path, tmp_path: Path
) -> None:
    base = steep(tmp_path / "wide")
    train(settings("run", quant="nf4", model=str(base)))
    found = measure([tmp_path / "run"], text)
    assert [row.kind for row in found.rows] == ["base", "run", "run, converted"]
    assert found.base["path"] == str(base)
    assert found.rows[2].loss == pytest.approx(found.rows[1].loss, abs=1e-5)


def test_a_full_fine_tuning_is_compared_with_its_base(
    settings: Callable[..., Any], base: Path, text: Path, tmp_path: Path
) -> None:
    train(settings("run", method="full"))
    row = only([tmp_path / "run"], text)
    assert (row.kind, row.kl > 1e-8) == ("run", True)


def test_a_model_that_computes_in_4_bits_is_compared(text: Path, tmp_path: Path) -> None:
    base = steep(tmp_path / "base")
    tokens = torch.randint(3, 250, (4, 32), generator=torch.Generator().manual_seed(0))
    seen = observe(language_model(base), [{"input_ids": tokens}], "inputs", inputs=64)
    svdquant(base, tmp_path / "w4a4", seen, 16, options={"smoothing": False, "rounds": 1})
    row = only([tmp_path / "w4a4"], text)
    assert row.kind == "w4a4"
    assert 1e-7 < row.kl < 0.1


def test_windows_begin_with_the_mark_that_the_tokenizer_writes(
    base: Path, text: Path, tmp_path: Path
) -> None:
    plain = measure([base], text, base=str(base))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"bos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 0)]
    )
    tokenizer.save_pretrained(base)
    marked = measure([base], text, base=str(base))
    assert (plain.text["tokens"], plain.text["predicted"], plain.text["windows"]) == (230, 222, 8)
    # Eight windows of 31 tokens of the text, none of them unpredicted.
    assert (marked.text["tokens"], marked.text["predicted"], marked.text["windows"]) == (
        230,
        230,
        8,
    )


def test_a_text_is_cut_to_the_models_positions_and_to_the_limit(base: Path, text: Path) -> None:
    found = fidelity([str(base)], text, base=str(base), limit_tokens=100, device="cpu")
    assert (found.text["max_length"], found.text["tokens"], found.text["windows"]) == (64, 100, 2)


def test_the_batch_size_changes_nothing(trained: Trained, text: Path) -> None:
    one, other = trained.found.rows[1], measure([trained.run], text, batch_size=3).rows[1]
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert one.kl == pytest.approx(other.kl, rel=1e-4)


def test_rows_of_text_are_read_and_others_refused_by_line(base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert measure([base], rows, base=str(base)).text["tokens"] == len("one\n\ntwo")
    rows.write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:?.*2.*expected a text in `text`"):
        measure([base], rows, base=str(base))


def test_a_model_of_another_base_is_refused(
    trained: Trained, pico_folder: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    other = pico_folder("other", seed=1, vocab_size=260)
    save_tokenizer(other)
    make_run(other, tmp_path / "strange")
    pissa.decompose(other, tmp_path / "split", rank=4)
    pissa.merge(other, tmp_path / "strange", tmp_path / "merged")
    for name in ("strange", "split", "merged"):
        with pytest.raises(WrongBaseError, match=rf"{name}, compared with .*base"):
            measure([tmp_path / name], text, base=str(trained.base))
        with pytest.raises(WrongBaseError, match=rf"{name} was made from .*other"):
            measure([trained.run, tmp_path / name], text)


def test_a_base_that_is_not_on_record_must_be_named(base: Path, text: Path) -> None:
    with pytest.raises(InputError, match="--base"):
        measure([base], text)


def test_another_tokenizer_or_another_number_of_logits_is_refused(
    base: Path, pico_folder: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "renamed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<odd>"])
    tokenizer.save_pretrained(tmp_path / "renamed")
    with pytest.raises(
        InputError, match=r"renamed has another tokenizer than the base: \"<odd>\" is 257"
    ):
        measure([tmp_path / "renamed"], text, base=str(base))
    padded = pico_folder("padded", vocab_size=264)
    save_tokenizer(padded)
    with pytest.raises(InputError, match="264 logits and the base 260"):
        measure([padded], text, base=str(base))


def test_a_text_that_is_not_there_or_says_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        measure([base], tmp_path / "nowhere.txt", base=str(base))
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="expected 2 or more"):
        measure([base], tmp_path / "short.txt", base=str(base))


@pytest.mark.parametrize("place", ["run", "run/adapter/sub", "base/new"])
def test_an_output_inside_a_model_or_its_base_is_refused_and_nothing_written(
    trained: Trained, text: Path, place: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.base.parent.rglob("*")}
    with pytest.raises(OutputError, match=r"is or lies inside .*, which is compared"):
        measure([trained.run], text, output=trained.base.parent / place)
    assert {path: path.stat().st_mtime_ns for path in trained.base.parent.rglob("*")} == before


def test_an_output_beside_or_above_the_models_is_taken_and_none_is_made_for_a_wrong_base(
    trained: Trained, base: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained.merged, tmp_path / "models" / "merged")
    measure([tmp_path / "models" / "merged"], text, output=tmp_path / "models")
    assert (tmp_path / "models" / "fidelity.json").is_file()
    with pytest.raises(WrongBaseError):
        measure([trained.run], text, base=str(steep(tmp_path / "strange")), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_are_said_and_are_null_in_the_file(
    base: Path, text: Path, tmp_path: Path
) -> None:
    model = language_model(base)
    with torch.no_grad():
        # The head's row of one byte: it comes in each window, among numbers that are finite.
        model.lm_head.weight[40] = math.nan
    model.save_pretrained(tmp_path / "broken")
    save_tokenizer(tmp_path / "broken")
    found = measure([base, tmp_path / "broken"], text, base=str(base), output=tmp_path / "out")
    assert math.isnan(found.rows[1].largest) and math.isnan(found.rows[1].kl)
    assert found.notes == [f"{tmp_path / 'broken'} (model): not all logits are finite here or in the base, so its "
                           "figures say nothing"]  # fmt: skip
    strict = json.loads((tmp_path / "out/fidelity.json").read_text(), parse_constant=pytest.fail)
    assert strict["notes"] == found.notes
    assert strict["rows"][0]["largest"] == 0 and strict["rows"][1]["largest"] is None


def test_one_number_that_is_none_makes_the_largest_and_the_mean_none() -> None:
    for values in ([1.0, math.nan, 2.0], [math.nan, 1.0], [1.0, math.inf]):
        assert math.isnan(largest(values))
        assert math.isnan(mean(values, [1] * len(values))[0])
    assert largest([1.0, 3.0, 2.0]) == 3.0
    # E to this is no float64
    huge = Compared(1, base_loss=0.0, loss=1e5, kl=1e5, agreed=0, largest=1e5)
    assert mean_row("huge", "model", {}, "float32", [huge]).perplexity == math.inf


def test_a_folder_in_4_bits_that_computes_in_another_dtype_is_told_of(
    text: Path, tmp_path: Path
) -> None:
    base = steep(tmp_path / "base")
    pissa.decompose(base, tmp_path / "packed", "qpissa", 16)
    for dtype, notes in (("float32", 0), ("bfloat16", 1)):
        found = measure([tmp_path / "packed"], text, dtype=dtype)
        assert [row.dtype for row in found.rows] == [dtype, "float32"]
        assert len(found.notes) == notes
    assert "packed (decomposed) computes in float32 and the base in bfloat16" in found.notes[0]


def typed(*words: object) -> Result:
    """`pissa eval` with these words; errors come out."""
    app = typer.Typer()
    app.command()(command.evaluate)
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--fidelity --text {} --limit 5", "--limit"),
        ("--fidelity --text {} --tasks gsm8k", "--tasks"),
        ("--fidelity --text {} --data x --track paper", "--track, --data|--data, --track"),
        ("--fidelity --text {} --judge http://localhost", "--judge"),
        ("--fidelity --text {} --judge-model x", "--judge-model"),
        ("--fidelity --text {} --no-base-row", "--no-base-row"),
        ("--fidelity --text {} --force", "--force"),
        ("--text {}", "--text"),
        ("--tokens 5", "--tokens"),
        ("--max-length 5", "--max-length"),
        ("--judge http://localhost", "--judge.*mt_bench is not among"),
        ("--judge http://localhost --judge-model x --tasks gsm8k,math", "--judge, --judge-model"),
        ("--tasks mt_bench --judge-model x", "--judge-model, but no --judge"),
        ("--tasks mt_bench --judge-key-env x", "--judge-key-env, but no --judge"),
    ],
)
def test_what_the_command_would_ignore_is_refused_by_its_flag(
    words: str, flag: str, text: Path
) -> None:
    with pytest.raises(InputError, match=flag):
        typed("nowhere", *words.format(text).split())


def test_the_command_passes_batch_length_and_tokens_on_and_prints_notes(
    trained: Trained, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(
        "pissa.evaluation.fidelity.compare",
        lambda base, other, batch, name: (
            sizes.append(tuple(batch.shape)) or compare(base, other, batch, name)
        ),
    )
    words = (
        trained.merged,
        "--fidelity",
        "--text",
        text,
        "--device",
        "cpu",
        "--base",
        trained.base,
    )
    limits = ("--batch-size", 3, "--max-length", 16, "--tokens", 100)
    said = json.loads(typed(*words, *limits, "--json").stdout)
    assert sizes == 2 * [(3, 16), (3, 16), (1, 4)]
    assert (said["text"]["max_length"], said["text"]["tokens"]) == (16, 100)
    sizes.clear()
    done = typed(*words, "-o", tmp_path / "out")
    assert sizes == 2 * [(3, 64), (1, 38)]  # of 64 positions, and four windows at a time
    assert "merged" in done.stdout and "float32" in done.stdout
    assert (tmp_path / "out/fidelity.json").is_file()
    assert "computes in bfloat16 and the base in" not in done.stderr
    half = tmp_path / "half"
    language_model(trained.merged, torch.bfloat16).save_pretrained(half)
    save_tokenizer(half)
    assert "computes in bfloat16 and the base in float32" in typed(half, *words[1:]).stderr


def test_one_base_in_two_dtypes_is_one_base(base: Path, text: Path, tmp_path: Path) -> None:
    pissa.decompose(base, tmp_path / "folder", rank=4)
    make_run(base, tmp_path / "run", dtype=torch.bfloat16)
    found = fidelity(
        [str(tmp_path / "folder"), str(tmp_path / "run")], text, device="cpu", max_length=16
    )
    assert [row.kind for row in found.rows] == ["base", "decomposed", "run", "run, converted"]
