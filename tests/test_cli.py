"""The commands as a person types them; in this process, since a fresh one spends seconds on imports."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import pissa
from conftest import build_pico
from pissa.cli.main import main

COMMANDS = ("decompose", "train", "convert", "merge", "inspect", "methods", "demo")


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Done:
    stdout, stderr = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["pissa", *map(str, arguments)]
    try:
        with redirect_stdout(stdout), redirect_stderr(stderr), warnings.catch_warnings():
            main()
    except SystemExit as exit_:
        return Done(int(exit_.code or 0), stdout.getvalue(), stderr.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("main() always exits")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ decomposed into dec/, and a run/ saved right after attaching."""
    root = tmp_path_factory.mktemp("cli")
    build_pico().save_pretrained(root / "base")
    assert run("decompose", root / "base", root / "dec", "--rank", 4).returncode == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    attached = pissa.attach(model, rank=4)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    pissa.save(attached, root / "run")
    return root


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['pissa', '--help']\n"
        "from pissa.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    assert run(command, "--help").returncode == 0


def test_decompose_says_what_to_type_next(folders: Path) -> None:
    done = run("decompose", folders / "base", folders / "again", "--rank", 2, "--method", "olora")
    assert done.returncode == 0
    assert "next:" in done.stderr
    assert f"pissa inspect {folders / 'again'}" in done.stderr
    assert done.stdout == ""


def test_json_is_the_record_on_stdout(folders: Path) -> None:
    done = run("decompose", folders / "base", folders / "as_json", "--rank", 2, "--json")
    record = json.loads(done.stdout)
    assert record == json.loads((folders / "as_json/pissa.json").read_text())


def test_inspect_tells_a_run_from_its_base(folders: Path) -> None:
    build_pico(seed=1).save_pretrained(folders / "other")
    same = run("inspect", folders / "run", "--base", folders / "base", "--json")
    assert same.returncode == 0
    assert json.loads(same.stdout)["base_check"] == "same"
    different = run("inspect", folders / "run", "--base", folders / "other")
    assert different.returncode == 1
    assert "embed_tokens.weight" in different.stdout


def test_convert_and_merge_run_from_the_command_line(folders: Path) -> None:
    assert (
        run("convert", folders / "run", folders / "lora", "--base", folders / "base").returncode
        == 0
    )
    assert json.loads((folders / "lora/adapter_config.json").read_text())["r"] == 8
    assert run("merge", folders / "base", folders / "lora", folders / "merged").returncode == 0
    merged, base = (load_file(folders / name / "model.safetensors") for name in ("merged", "base"))
    assert set(merged) == set(base)
    assert not torch.equal(
        merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]
    )


def test_methods_lists_the_folder() -> None:
    listed = {method["name"] for method in json.loads(run("methods", "--json").stdout)}
    folder = Path(__file__).parents[1] / "src/pissa/methods"
    assert {name.rstrip("+") for name in listed} == {file.stem for file in folder.glob("*.py")} - {
        "__init__"
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decompose", "{base}", "{out}", "--rank", "0"], ["rank 0", "1"]),
        (
            ["decompose", "{base}", "{out}", "--rank", "999"],
            ["rank 999", "k_proj.weight", "use --rank 16"],
        ),
        (["decompose", "{base}", "{out}", "--alpha", "-1"], ["alpha is -1"]),
        (["decompose", "{base}", "{out}", "--method", "pisa"], ["'pisa'", "Did you mean 'pissa'"]),
        (
            ["decompose", "{base}", "{out}", "--targets", "q_prj"],
            ["'q_prj'", "Did you mean 'q_proj'"],
        ),
        (["decompose", "{base}", "{base}"], ["base"]),
        (
            ["decompose", "{nan}", "{out}", "--rank", "4"],
            ["layers.1.mlp.up_proj.weight", "non-finite"],
        ),
        (["decompose", "{dec}", "{out}"], ["itself a residual"]),
        (["merge", "{base}", "{dec}/pissa_init", "{out}"], ["only right beside the residual"]),
        (["convert", "{base}", "{out}"], ["expected a run"]),
        (["inspect", "{out}"], ["not a folder"]),
        (["train", "--modle", "x"], ["modle", "Did you mean 'model'"]),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    folders: Path, arguments: list[str], words: list[str]
) -> None:
    nan = folders / "nan"
    if not nan.exists():
        build_pico().save_pretrained(nan)
        tensors = load_file(nan / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, nan / "model.safetensors", metadata={"format": "pt"})
    places = {"base": folders / "base", "dec": folders / "dec", "nan": nan, "out": folders / "out"}
    done = run(*[argument.format(**places) for argument in arguments])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (folders / "out").exists()


def test_python_m_pissa_ends_a_mistake_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pissa", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pissa: ")
    assert "Traceback" not in done.stderr
