"""Claims about what a training leaves to read: the page tells the run's own numbers, the card loads the adapter."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import pissa
from conftest import build_pico
from pissa.cli.main import app
from pissa.errors import CheckpointError, OutputError
from pissa.linalg import effective_rank, principal_angles
from pissa.reports import next_commands, read_run, write_card, write_report
from pissa.reports.changes import changes_of
from pissa.reports.page import duration, number, percent, size, svg, write_page
from training_runs import save_tokenizer

CHROMIUM = shutil.which("chromium")


class Page(html.parser.HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.loaded += [value for name, value in attrs if name in ("src", "href") and value]
        if tag in ("svg", "img"):
            self.pictures.append(named)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def cli(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, rows of both tasks, and one run by each way of training, made as a user makes them."""
    place = tmp_path_factory.mktemp("place")
    build_pico(vocab_size=260).save_pretrained(place / "base")
    save_tokenizer(place / "base")
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    (place / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [f"{n},{'even' if n % 2 == 0 else 'odd'}\n" for n in range(20)]
    (place / "numbers.csv").write_text("text,label\n" + "".join(labels))
    common = "--rank 4 --batch_size 4 --max_steps 4 --max_length 32 --learning_rate 1e-2 --eval_size 4 --eval_steps 2"
    for name, more in {
        "pissa": "--data words.jsonl",
        "lora": "--data words.jsonl --method lora",
        "full": "--data words.jsonl --method full",
        "int8": "--data words.jsonl --quant int8",
        "classes": "--data numbers.csv --task classification",
    }.items():
        values = [
            str(place / word) if word.endswith(("jsonl", "csv")) else word for word in more.split()
        ]
        cli(
            "train",
            "--model",
            place / "base",
            "--output",
            place / name,
            "--device",
            "cpu",
            *common.split(),
            *values,
        )
    return place


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """A copy of the PiSSA run, to damage."""
    return Path(shutil.copytree(place / "pissa", tmp_path / "run"))


def dense_changes(run: Path) -> dict[str, torch.Tensor]:
    """Every weight's change, from the adapter file as stock tools read it."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith("lora_A.weight")]
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        )
        for name in names
    }


@pytest.mark.parametrize("angle", [1e-11, 1e-9, 1e-3, 0.7, 1.5, math.pi / 2])
def test_principal_angles_are_exact_from_tiny_to_right(angle: float) -> None:
    torch.manual_seed(0)
    frame = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q
    first, aside = frame[:, :3], frame[:, 3:]
    turned = first.clone()
    turned[:, 2] = math.cos(angle) * first[:, 2] + math.sin(angle) * aside[:, 0]
    mixed = (
        first @ torch.randn(3, 3, dtype=torch.float64),
        turned @ torch.randn(3, 3, dtype=torch.float64),
    )
    angles = principal_angles(*mixed)
    assert angles[2].item() == pytest.approx(angle, rel=1e-9, abs=1e-13)
    assert angles[:2].max() < 1e-13


def test_effective_rank_counts_equal_values() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([1.0, 1e-9])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("run", ["pissa", "lora"])
def test_the_change_of_each_layer_is_that_of_the_adapter(place: Path, run: str) -> None:
    weights = dict(
        transformers.AutoModelForCausalLM.from_pretrained(place / "base").named_parameters()
    )
    dense = dense_changes(place / run)
    changes = changes_of(place / run)
    assert {change.module for change in changes} == set(dense)
    for change in changes:
        values = torch.linalg.svdvals(dense[change.module])
        got = torch.tensor(change.singular_values, dtype=torch.float64)[: len(values)]
        assert torch.allclose(got, values[: len(got)], atol=1e-5 * float(values[0]))
        assert change.norm == pytest.approx(float(dense[change.module].norm()), rel=1e-4)
        weight = weights[f"{change.module}.weight"].detach()
        assert change.relative == pytest.approx(change.norm / float(weight.norm()), rel=1e-4)


def test_the_turn_is_that_of_the_stored_factors(place: Path) -> None:
    state = load_file(place / "pissa" / "state" / "state.safetensors")
    for change in changes_of(place / "pissa"):
        start = torch.linalg.qr(state[f"{change.module}.start_left"].double()).Q
        moved = (
            state[f"{change.module}.start_left"].double()
            + state[f"{change.module}.drift_left"].double()
        )
        cosines = torch.linalg.svdvals(start.T @ torch.linalg.qr(moved).Q)
        assert torch.tensor(change.left_angles).deg2rad().cos().tolist() == pytest.approx(
            cosines.tolist(), abs=1e-6
        )
        assert change.left_angles[-1] > 0.1 and change.right_angles[-1] > 0.1


def test_a_base_that_changed_since_is_not_measured_against(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "lora", tmp_path / "run")
    record = run / "state" / "pissa.json"
    build_pico(seed=1, vocab_size=260).save_pretrained(tmp_path / "other")
    record.write_text(record.read_text().replace(str(place / "base"), str(tmp_path / "other")))
    assert all(change.relative is None for change in changes_of(run))
    assert "|ΔW| / |W| is left out" in Page(write_report(run).read_text()).text


@pytest.mark.parametrize("run", ["pissa", "lora", "full", "int8", "classes"])
def test_a_training_leaves_a_page_that_needs_nothing_else(place: Path, run: str) -> None:
    source = (place / run / "report.html").read_text()
    page, record = Page(source), read_run(place / run)
    assert all(link.startswith(("#", "data:")) for link in page.loaded)
    assert (
        not page.tags & {"script", "link-stylesheet", "iframe", "object"}
        and "@import" not in source
    )
    assert not re.search(r"url\((?!#)", source)
    assert all(picture["aria-label"] for picture in page.pictures) and len(page.pictures) >= 3
    assert len(page.ids) == len(set(page.ids))
    assert number(record["eval_loss"]) in page.text
    assert record["data"]["sources"][0]["sha256"][:16] in page.text
    assert all(command in page.text for _, command in next_commands(place / run, record))
    assert ("What changed" in page.text) and (("left out" in page.text) == (run == "full"))
    assert ("accuracy" in page.text) == (run == "classes")
    assert ("Principal angles between" in page.text) == (run in ("pissa", "int8", "classes"))


def test_the_page_is_the_same_each_time(copy: Path) -> None:
    assert (
        write_report(copy, copy / "one.html").read_bytes()
        == write_report(copy, copy / "two.html").read_bytes()
    )


def test_settings_by_hand_come_before_defaults(place: Path) -> None:
    text = Page((place / "pissa" / "report.html").read_text()).text
    settings = text[text.index("Settings") : text.index(" Data ")]
    assert (
        settings.index("learning_rate")
        < settings.index("at their defaults")
        < settings.index("weight_decay")
    )


def test_a_killed_run_has_a_page_that_says_how_to_go_on(copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    facts = {key: record[key] for key in ("settings", "data", "base", "labels", "versions")}
    (copy / "run.json").write_text(json.dumps({"status": "running", **facts}))
    whole = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(whole[:-20])
    page = Page(write_report(copy).read_text())
    assert "## Results" not in write_card(copy).read_text()
    assert "not finished" in page.text and f"pissa train {copy}/settings.yaml --resume" in page.text
    assert len(page.pictures) == 3 and "What changed" not in page.text
    (copy / "metrics.jsonl").write_text("")
    assert "No step has been logged yet" in Page(write_report(copy).read_text()).text


def test_names_in_a_run_are_text_and_never_markup(copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    record["settings"]["model"] = "<script>alert(1)</script>"
    (copy / "run.json").write_text(json.dumps(record))
    source = write_report(copy).read_text()
    assert "script" not in Page(source).tags and "&lt;script&gt;" in source


def test_what_is_no_run_is_refused_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run\.json"):
        write_report(place / "base", tmp_path / "page.html")
    (tmp_path / "run.json").write_text('{"status": "cleared"}')
    with pytest.raises(CheckpointError, match="never came to its first step"):
        write_report(tmp_path, tmp_path / "page.html")
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(tmp_path / "run.json" / "page.html", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_report_prints_the_page_it_wrote(copy: Path) -> None:
    assert cli("report", copy, "--output", copy / "mine.html") == f"{copy / 'mine.html'}\n"
    assert json.loads(cli("report", copy, "--json")) == {"report": str(copy / "report.html")}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_draws_the_page_without_a_network(
    place: Path, tmp_path: Path, width: int
) -> None:
    matplotlib = pytest.importorskip("matplotlib.image")
    shot = tmp_path / "shot.png"
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *offline,
    ]
    page = (place / "pissa" / "report.html").as_uri()
    subprocess.run(
        [*command, f"--window-size={width},1600", f"--screenshot={shot}", page],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = matplotlib.imread(shot)[..., :3]
    assert pixels.shape[1] == width
    ink = (abs(pixels - pixels[0, 0]).max(axis=-1) > 0.2).mean(axis=1)
    assert ((ink > 0).reshape(8, -1).any(axis=1)).all(), "a blank band"


def test_two_pictures_on_a_page_share_no_names() -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    texts = []
    for height in (1, 2):
        figure = figure_module.Figure()
        figure.add_subplot().plot([0, height], color="black")
        texts.append(str(svg(figure)))
    assert not set(Page(texts[0]).ids) & set(Page(texts[1]).ids)
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', texts[0])
    assert references and set(references) <= set(Page(texts[0]).ids)
    assert "currentColor" in texts[0] and "#000000" not in texts[0]


def test_numbers_read_as_a_person_writes_them() -> None:
    assert [number(value) for value in (0.123456, 2e-5, 1234567, 12345.6, 0.0, None)] == [
        "0.1235", "2e-5", "1,234,567", "12,346", "0", "–",
    ]  # fmt: skip
    assert [duration(value) for value in (0.4, 59.96, 93.2, 7322, 90061)] == [
        "0.4 s", "1 min", "1 min 33 s", "2 h 2 min", "1 d 1 h",
    ]  # fmt: skip
    assert [size(value) for value in (0, 999, 1000, 1.5e9)] == ["0 B", "999 B", "1 kB", "1.5 GB"]
    assert [percent(value) for value in (0.123456, 1.2e-4, 1)] == ["12.3 %", "0.012 %", "100 %"]


def snippet(card: Path) -> str:
    found = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("run", ["pissa", "lora", "full", "int8", "classes"])
def test_the_code_on_a_card_loads_what_was_trained(place: Path, run: str) -> None:
    folder = place / run / ("model" if run == "full" else "adapter")
    code = snippet(folder / "README.md")
    for word, where in {
        "THIS_FOLDER": folder,
        "FOLDER_OF_THE_BASE": place / "base",
        "RESIDUAL_FOLDER": place / run / "residual",
    }.items():
        code = code.replace(word, str(where))
    names: dict[str, object] = {}
    exec(code, names)
    ids = torch.arange(3, 23)[None]
    got = names["model"].eval()(ids).logits  # type: ignore[attr-defined]
    auto = (
        transformers.AutoModelForSequenceClassification
        if run == "classes"
        else transformers.AutoModelForCausalLM
    )
    if run == "full":
        expected = auto.from_pretrained(folder)(ids).logits
    else:
        more = {"num_labels": 2} if run == "classes" else {}
        base = auto.from_pretrained(
            place / run / "residual" if run == "int8" else place / "base", **more
        )
        expected = pissa.load(base, place / run, trainable=False)(ids).logits
    assert torch.allclose(got, expected, atol=1e-4)


def test_a_card_names_hub_models_and_data_and_no_folder_of_this_machine(copy: Path) -> None:
    text = (copy / "adapter" / "README.md").read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.base_model, data.datasets) == ("peft", None, None)
    assert "/" not in text.replace("alpha / rank", "") and "words.jsonl" in text
    for file in (copy / "run.json", copy / "adapter" / "pissa.json"):
        record = json.loads(file.read_text())
        record["base"]["name"] = "meta-models/Tiny-1B"
        if "data" in record:
            record["data"]["sources"][0]["name"] = "openai/gsm8k:main"
        file.write_text(json.dumps(record))
    card = ModelCard.load(write_card(copy))
    assert (card.data.base_model, card.data.datasets) == ("meta-models/Tiny-1B", ["openai/gsm8k"])
    assert (
        'from_pretrained("meta-models/Tiny-1B")' in card.text and "openai/gsm8k:main" in card.text
    )


def test_a_card_of_few_bits_warns_of_the_original(place: Path) -> None:
    assert "wrong on the original base" in (place / "int8" / "adapter" / "README.md").read_text()
    assert "wrong on" not in (place / "pissa" / "adapter" / "README.md").read_text()


def test_a_converted_adapter_has_a_card_that_says_what_was_lost(
    place: Path, tmp_path: Path
) -> None:
    lost = json.loads(cli("convert", place / "pissa", tmp_path / "cut", "--rank", 2, "--json"))[
        "notes"
    ]["error"]
    text = (tmp_path / "cut" / "README.md").read_text()
    assert (
        f"{percent(lost)} of the change is lost" in text and "| rank of this adapter | 2 |" in text
    )
