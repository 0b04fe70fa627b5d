"""What `docs/add_a_method.md` promises: one file adds a method, a quantizer or a form, and nothing
else is touched.

The package is copied, the files of the page and a few throw-away ones are put into the copy, and
other processes use it as a newcomer would.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/add_a_method.md"
FILE = re.compile(r"<!-- file: src/(\S+) -->\n```python\n(.*?)```", re.DOTALL)
HEAD = '''"""Thrown away."""

import torch

from pissa.linalg import truncated_svd
from pissa.randomness import noise_beside_zero, tensor_seed
from pissa.registry import method
from pissa.splits import Split

FACTS = dict(paper="none", trains="a test", verdict="a test")
'''
THROWN_AWAY = {
    "both_and_core": HEAD
    + '''

@method("both_and_core", title="T", parts=("left", "core"), **FACTS)
def both_and_core(weight, rank, *, scale, svd, seed, name):
    """LaMDA's parts without its schedule."""
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    return Split(weight, top.U, top.Vh, torch.diag(top.S / scale), scale)
''',
    "core_alone": HEAD
    + '''

@method("core_alone", title="T", parts=("core",), **FACTS)
def core_alone(weight, rank, *, scale, svd, seed, name):
    """A core that starts as a part of the weight, between factors that are frozen."""
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    return Split(weight, top.U, top.Vh, torch.diag(top.S / scale), scale)
''',
    "left_and_zero_core": HEAD
    + '''

@method("left_and_zero_core", title="T", parts=("left", "core"), zero_start=True, **FACTS)
def left_and_zero_core(weight, rank, *, scale, svd, seed, name):
    """The left factor trains beside a core of zeros."""
    top = truncated_svd(weight, rank, svd, seed=seed, name=name)
    return Split(weight, top.U, top.S[:, None] * top.Vh, top.S.new_zeros(rank, rank), scale)
''',
    "by_sgd": HEAD
    + '''

def optimizer(model, learning_rate, *, weight_decay, momentum):
    """Plain SGD, of an option of the method."""
    trained = [part for part in model.parameters() if part.requires_grad]
    print("BY SGD", momentum)
    return torch.optim.SGD(trained, learning_rate, momentum=momentum, weight_decay=weight_decay)


@method("by_sgd", title="T", zero_start=True, optimizer=optimizer, **FACTS)
def by_sgd(weight, rank, *, scale, svd, seed, name, momentum: float = 0.5):
    """LoRA with an optimizer of its own."""
    return noise_beside_zero(weight, rank, scale, tensor_seed(seed, name))
''',
    "by_schedule": HEAD
    + '''

def schedule(model, every):
    """A callback of transformers, made late, since methods need torch alone."""
    from transformers import TrainerCallback

    class Say(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print("STEP", state.global_step, every)

    return Say()


@method("by_schedule", title="T", schedule=schedule, **FACTS)
def by_schedule(weight, rank, *, scale, svd, seed, name, every: int = 1):
    """PiSSA with a schedule of its own."""
    left, right = truncated_svd(weight, rank, svd, seed=seed, name=name).balanced(scale)
    return Split(weight, left, right, scale=scale)
''',
    "sampled": HEAD
    + '''

@method("sampled", title="T", needs="inputs", zero_start=True, **FACTS)
def sampled(weight, rank, *, scale, svd, seed, name, inputs):
    """LoRA that reads along inputs it was shown."""
    right = inputs[:rank].to(weight) / inputs[:rank].to(weight).norm(dim=1, keepdim=True)
    return Split(weight, right.new_zeros(len(weight), rank), right, scale=scale)
''',
}
"""By name of the file and the method: parts that LaMDA's schedule used to be guessed from, an optimizer, a schedule."""
METHODS = ("middle", "lora_fa", *THROWN_AWAY)
LIVE = """
import json, sys, torch, transformers, pissa
from pathlib import Path
from peft import PeftModel
from conftest import TOKENS, build_pico
from pissa.config import load_settings
from pissa.registry import methods
from training_runs import save_tokenizer

torch.set_num_threads(1)
root = Path(sys.argv[1])
build_pico(vocab_size=260).save_pretrained(root / "base")
save_tokenizer(root / "base")
load = transformers.AutoModelForCausalLM.from_pretrained

@torch.no_grad()
def logits(model):
    return model.eval()(TOKENS).logits

def away(model, expected):
    return float((logits(model) - expected).abs().max())

before = logits(load(root / "base"))
for name in sys.argv[2:]:
    run, beside = root / name, root / f"{name}-beside"
    settings = {"model": str(root / "base"), "data": str(root / "words.jsonl"), "output": str(run), "method": name,
                "rank": 4, "max_steps": 3, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.01,
                "max_length": 24, "save_steps": 2, "device": "cpu"}
    pissa.train(load_settings(None, settings))
    model = pissa.load(load(root / "base"), run)
    after = logits(model)
    moved = float((after - before).abs().max())
    pissa.convert(run, beside / "lora")
    pissa.merge(root / "base", run, beside / "merged")
    model.save_pretrained(beside / "stock")
    facts = {
        "name": name,
        "moved": moved,
        "adapter": away(PeftModel.from_pretrained(load(root / "base"), run / "adapter"), after),
        "stock": away(PeftModel.from_pretrained(load(root / "base"), beside / "stock"), after),
        "converted": away(PeftModel.from_pretrained(load(root / "base"), beside / "lora"), after),
        "merged": away(load(beside / "merged"), after),
        "merged in memory": away(pissa.load(load(root / "base"), run).merge_and_unload(), after),
        "listed": methods()[name].name,
    }
    with model.disable_adapter():
        facts["disabled"] = away(model, before)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL's trainers ask for a reference
    model.set_adapter("ref")
    facts["twin"] = away(model, before)
    own = {key: part for key, part in model.named_parameters() if ".default." in key}
    with torch.no_grad():
        for key, part in model.named_parameters():
            if ".ref." in key:
                part.copy_(own[key.replace(".ref.", ".default.")])
    facts["twin that learnt"] = away(model, after)
    if methods()[name].observes is None:
        pissa.decompose(root / "base", beside / "out", name, 4)
        started = pissa.load(load(beside / "out"), beside / "out")
        facts["decomposed"] = away(started, before)
        stock = PeftModel.from_pretrained(load(beside / "out"), beside / "out" / "pissa_init")
        facts["decomposed, stock"] = away(stock, before)
    print("FACTS", json.dumps(facts))
"""
BITS = """
import sys, torch, transformers, pissa
from pathlib import Path
from conftest import TOKENS, build_pico
from pissa.linalg import relative_error

root = Path(sys.argv[1])
build_pico().save_pretrained(root / "base")
weight = build_pico().model.layers[0].mlp.up_proj.weight.detach()
alone, split = (pissa.split(weight, name, 8, quant="sign") for name in ("lora", "pissa"))
errors = [relative_error(one.rebuild(), weight) for one in (alone, split)]
assert errors[1] < errors[0], errors
pissa.decompose(root / "base", root / "out", "pissa", 8, quant="sign", store="16bit")
load = transformers.AutoModelForCausalLM.from_pretrained
model = pissa.load(load(root / "out"), root / "out")
with torch.no_grad():
    loaded = model(TOKENS).logits
pissa.save(model, root / "run")
pissa.merge(root / "out", root / "run", root / "merged")
with torch.no_grad():
    assert (load(root / "merged")(TOKENS).logits - loaded).abs().max() < 1e-4
try:
    pissa.decompose(root / "base", root / "packed", "pissa", 8, quant="sign")
except pissa.PissaError as error:
    assert "--store 16bit" in str(error), error
else:
    raise AssertionError("packed")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the files of the page and the throw-away ones in it."""
    source = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "src/pissa", source / "pissa")
    written = FILE.findall(PAGE.read_text(encoding="utf-8"))
    assert [name.split("/")[1] for name, _ in written] == [
        "methods",
        "quant",
        "adapters",
        "methods",
    ]
    thrown_away = [(f"pissa/methods/{name}.py", code) for name, code in THROWN_AWAY.items()]
    for name, code in [*written, *thrown_away]:
        file = source / name
        assert not file.exists()
        file.write_text(code, encoding="utf-8")
    return source


def in_copy(package: Path, *words: str) -> str:
    """What Python prints that finds the copy first."""
    path = os.pathsep.join([str(package), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_methods_of_one_file_train_and_leave_by_every_way(
    package: Path, words: Path, tmp_path: Path
) -> None:
    printed = in_copy(package, "-c", LIVE, str(tmp_path), *METHODS)
    lines = printed.splitlines()
    found = [json.loads(line.removeprefix("FACTS ")) for line in lines if line.startswith("FACTS")]
    assert [facts.pop("name") for facts in found] == list(METHODS)
    for name, facts in zip(METHODS, found, strict=True):
        assert facts.pop("listed") == name
        assert facts.pop("moved") > 1e-3, name  # after three steps
        wrong = {way: error for way, error in facts.items() if not error < 2e-5}
        assert not wrong, (name, wrong)
    assert sum(line == "BY SGD 0.5" for line in lines) == 1
    assert [line for line in lines if line.startswith("STEP")] == [
        "STEP 1 1",
        "STEP 2 1",
        "STEP 3 1",
    ]


def test_a_quantizer_of_one_file_splits_decomposes_and_merges(
    package: Path, tmp_path: Path
) -> None:
    in_copy(package, "-c", BITS, str(tmp_path))
    assert "sign" in in_copy(package, "-m", "pissa", "methods")


def test_the_laws_hold_for_methods_that_were_added(package: Path) -> None:
    picked = " or ".join(name for name in METHODS if name not in ("sampled", "lora_fa"))
    printed = in_copy(
        package,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_laws.py",
        "-k",
        picked,
    )
    assert int(re.search(r"(\d+) passed", printed)[1]) > 100
