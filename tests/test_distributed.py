"""Two processes train as one does: DDP and FSDP2 with the example files' settings, ZeRO-3 where DeepSpeed is there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

import pissa
from conftest import PACKABLE, build_pico
from pissa.config import load_settings
from pissa.errors import ConfigError
from pissa.training import distributed, train
from pissa.training.arguments import one_device
from pissa.training.folder import WHOLE, read_metrics
from runs import gap, language_model, logits, stock_logits
from training_runs import STEPS, save_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
DRIVER = Path(__file__).parent / "on_processors.py"
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="pip install deepspeed"
)
RANK_ONE_OF_TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its residuals in 32 and 4 bits, and rows to train on."""
    place = tmp_path_factory.mktemp("distributed")
    build_pico(vocab_size=260, **PACKABLE).save_pretrained(place / "base")
    save_tokenizer(place / "base")
    pissa.decompose(place / "base", place / "residual", "pissa", 4)
    pissa.decompose(place / "base", place / "nf4", "qpissa", 4)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    (place / "words.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return place


def settings_for(place: Path, model: str, output: str, **more: Any) -> Any:
    values = {
        "model": str(place / model), "data": str(place / "words.jsonl"), "output": str(place / output), "rank": 4,
        "method": "qpissa" if model == "nf4" else "pissa", "batch_size": 4, "micro_batch_size": 2, "max_steps": STEPS,
        "max_length": 32, "learning_rate": 1e-2, "save_steps": 2, "eval_size": 4, "eval_steps": 3, "device": "cpu",
    }  # fmt: skip
    return load_settings(None, values | more)


def alone(place: Path, model: str) -> Path:
    """The run of one process, made once."""
    out = place / f"{model}-alone"
    if not out.is_dir():
        train(settings_for(place, model, out.name))
    return out


def launch(settings: Any, sharding: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes, with what accelerate sets for an example file."""
    if sharding == "zero3":
        own = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file",
        }
        given = json.loads((EXAMPLES / "zero3.json").read_text())
        given["zero_optimization"]["stage3_param_persistence_threshold"] = (
            0  # pico weights are spread too
        )
        file = Path(f"{settings.output}.json")
        file.write_text(json.dumps(given))
        own |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "DS_ACCELERATOR": "cpu"}
    else:
        own = {
            key: value
            for key, value in example(sharding).items()
            if key.startswith(("ACCELERATE_", "FSDP_"))
        }
    config = Path(f"{settings.output}.yaml")
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    return subprocess.run(
        [*command, str(DRIVER), "train", str(config), *flags],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def example(name: str) -> dict[str, str]:
    """The environment that `accelerate launch` makes of examples/NAME-8.yaml."""
    file = str(EXAMPLES / f"{name}-8.yaml")
    words = ["--config_file", file, "--num_processes", "2", "-m", "pissa"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(arguments)


def losses(run: Path) -> torch.Tensor:
    return torch.tensor(
        [line.get("loss", line.get("eval_loss")) for line in read_metrics(run / "metrics.jsonl")]
    )


def assert_as_alone(place: Path, model: str, run: Path) -> None:
    """The same curve, and adapters that stock peft finds equal, the checkpoints' too."""
    expected, base = alone(place, model), place / ("nf4" if model == "nf4" else "base")
    assert torch.allclose(losses(run), losses(expected), rtol=0, atol=1e-4)
    for folder in ("adapter", "checkpoints/checkpoint-4", f"checkpoints/checkpoint-{STEPS}"):
        assert (
            gap(stock_logits(base, run / folder), stock_logits(base, expected / folder)) < 1e-4
        ), folder
    assert (
        gap(
            stock_logits(base, run / "adapter"),
            stock_logits(base, run / "checkpoints/checkpoint-4"),
        )
        > 1e-3
    )


def interrupted(run: Path, copy: Path) -> Path:
    """The run as a kill after its second checkpoint left it."""
    shutil.copytree(run, copy)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "status": "running"}))
    (copy / f"checkpoints/checkpoint-{STEPS}" / WHOLE).unlink()
    shutil.rmtree(copy / "adapter")
    return copy


SLOW = pytest.mark.slow
CASES = [
    ("ddp", "base"),
    ("fsdp2", "residual"),
    pytest.param("ddp", "nf4", marks=SLOW),
    pytest.param("ddp", "residual", marks=SLOW),
    pytest.param("fsdp2", "base", marks=SLOW),
    pytest.param("fsdp2", "nf4", marks=SLOW),
    pytest.param("zero3", "base", marks=[SLOW, needs_deepspeed]),
    pytest.param("zero3", "residual", marks=[SLOW, needs_deepspeed]),
    pytest.param("zero3", "nf4", marks=[SLOW, needs_deepspeed]),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharding", "method"),
    [("ddp", "corda"), ("ddp", "lora_pro"), ("fsdp2", "lamda"), ("fsdp2", "lora_xs")],
)
def test_the_family_trains_in_two_processes_as_in_one(
    place: Path, sharding: str, method: str
) -> None:
    own = {"method": method, "calibration_rows": 8}
    expected, run = place / f"{method}-alone", f"{method}-{sharding}"
    if not expected.is_dir():
        train(settings_for(place, "base", expected.name, **own))
    done = launch(settings_for(place, "base", run, **own), sharding)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.allclose(losses(place / run), losses(expected), rtol=0, atol=1e-4)
    one, two = (
        stock_logits(place / "base", place / name / "adapter") for name in (run, expected.name)
    )
    assert gap(one, two) < 1e-4
    broken = interrupted(place / run, place / f"{run}-broken")
    resumed = launch(settings_for(place, "base", broken.name, **own), sharding, "--resume")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert gap(stock_logits(place / "base", broken / "adapter"), one) < 1e-6


@pytest.mark.slow
def test_lora_pro_is_refused_where_factors_are_spread(place: Path) -> None:
    done = launch(settings_for(place, "base", "spread", method="lora_pro"), "fsdp2")
    assert done.returncode != 0 and "it needs whole factors" in done.stderr
    assert not (place / "spread" / "state").exists()


@pytest.mark.parametrize(("sharding", "model"), CASES)
def test_two_processes_train_as_one_does(place: Path, sharding: str, model: str) -> None:
    settings = settings_for(place, model, f"{model}-{sharding}")
    done = launch(settings, sharding, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    # Of the first process alone; DeepSpeed talks before it
    record = json.loads(done.stdout[done.stdout.index("{") :])
    assert record["processes"]["count"] == 2
    assert (
        record["trainable_parameters"]
        == json.loads((alone(place, model) / "run.json").read_text())["trainable_parameters"]
    )
    assert_as_alone(place, model, Path(settings.output))
    if sharding == "ddp" and model == "base":
        interrupted(Path(settings.output), place / "cut")
        with pytest.raises(ConfigError, match=r"count: got 1, expected 2 as the run began"):
            train(settings.model_copy(update={"output": str(place / "cut")}), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_an_interrupted_run_goes_on_in_two_processes(place: Path, sharding: str) -> None:
    settings = settings_for(place, "base", f"whole-{sharding}")
    assert launch(settings, sharding).returncode == 0
    cut = interrupted(place / f"whole-{sharding}", place / f"cut-{sharding}")
    done = launch(settings.model_copy(update={"output": str(cut)}), sharding, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_as_alone(place, "base", cut)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2", pytest.param("zero3", marks=needs_deepspeed)])
def test_every_weight_trains_in_two_processes(place: Path, sharding: str) -> None:
    one = settings_for(place, "base", "full-alone", method="full", force=True)
    train(one)
    two = settings_for(place, "base", f"full-{sharding}", method="full")
    done = launch(two, sharding)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.allclose(losses(Path(two.output)), losses(Path(one.output)), rtol=0, atol=1e-4)
    first, second = (logits(language_model(Path(run.output) / "model")) for run in (one, two))
    assert gap(first, second) < 1e-4


@pytest.mark.slow
def test_a_failure_of_the_first_process_ends_all_and_leaves_the_folder(place: Path) -> None:
    (place / "taken").mkdir()
    (place / "taken" / "letter").touch()
    done = launch(settings_for(place, "base", "taken"), "ddp")
    assert done.returncode != 0
    assert done.stderr.count("is not empty and holds no run") == 2
    assert [path.name for path in (place / "taken").iterdir()] == ["letter"]


def test_rows_that_cannot_be_dealt_out_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (RANK_ONE_OF_TWO | {"WORLD_SIZE": "8"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match="got 4 rows a step for 8 processes of micro_batch_size 2, expected a mult",
    ):
        distributed.join(settings_for(place, "base", "out"), "cpu")


def test_fsdp_of_the_first_version_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        RANK_ONE_OF_TWO | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="fsdp_version: got 1, expected 2"):
        distributed.join(settings_for(place, "base", "out"), "cpu")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_example_files_say_what_their_names_say(file: Path) -> None:
    words = [
        "--config_file",
        str(file),
        "--machine_rank",
        "0",
        "--main_process_ip",
        "host",
        "-m",
        "pissa",
    ]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    kind, machines = file.stem.split("-")
    assert (arguments.num_machines, arguments.num_processes) == (
        (4, 32) if machines == "4x8" else (1, 8)
    )
    assert (kind == "fsdp2", kind == "zero3") == (arguments.use_fsdp, arguments.use_deepspeed)
    if kind == "fsdp2":
        assert (int(arguments.fsdp_version), arguments.fsdp_cpu_ram_efficient_loading) == (2, False)


def test_without_a_launcher_one_gpu_is_used_and_the_batch_stays_what_it_is(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_train_batch_size=4
    )
    arguments._n_gpu = 8  # as on a machine with eight
    assert arguments.train_batch_size == 32
    assert one_device(arguments).train_batch_size == 4
