"""How commit 7da81ae made the old folders: `make.py folders PLACE`, then `make.py expect PLACE`.

It is kept to be read. The folders are what that commit left behind: later code must not make them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import peft
import tokenizers
import torch
import transformers

import pissa
from conftest import PACKABLE, build_pico  # also: bitsandbytes computes in float32
from old_folders import checks
from old_folders.checks import HERE, KEPT, PLACE, RANK, TOKENS, tensors_in
from pissa.config import load_settings
from pissa.observe import Observations
from pissa.training import callbacks
from pissa.w4a4 import svdquant

SMALL = {"vocab_size": 48, "num_hidden_layers": 1}
LETTERS = "0123456789Ġ+=.,:;!?-()'\"abcdefghijklmnopqrstuvw"
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "pissa": {"method": "pissa"},
    "pissa_residual": {"method": "pissa", "base": "residual"},
    "pissa_bf16": {"method": "pissa", "dtype": "bfloat16"},
    "milora": {"method": "milora"},
    "lora_xs": {"method": "lora_xs"},
    "svft": {
        "method": "svft",
        "options": {"pattern": "banded", "width": 1},
        "targets": ["k_proj", "down_proj"],
    },
    "lamda": {"method": "lamda", "options": {"eta": 0.5}},
    "eva": {"method": "eva", "calibration_rows": 8},
    "lora_pro": {"method": "lora_pro"},
    "classification": {"method": "pissa", "task": "classification", "data": "moods.jsonl"},
    "qpissa": {"method": "qpissa", "model": "base64"},
    "qlora": {"method": "qlora", "model": "base64"},
    "pissa_int8": {"method": "pissa", "quant": "int8", "model": "base64"},
    "lora_xs_nf4": {"method": "lora_xs", "quant": "nf4", "model": "base64"},
    "lamda_nf4": {"method": "lamda", "quant": "nf4", "options": {"eta": 0.5}, "model": "base64"},
}


class Stopped(Exception):
    pass


def settings_of(root: Path, name: str, output: str) -> Any:
    values: dict[str, Any] = {
        "model": "base", "data": "words.jsonl", **RANK, "batch_size": 4, "micro_batch_size": 2,
        "max_steps": 4, "max_length": 32, "learning_rate": 1e-2, "warmup_ratio": 0, "eval_size": 4,
        "eval_steps": 2, "save_steps": 2, "svd": "exact", "device": "cpu", **RUNS[name],
    }  # fmt: skip
    places = {key: str(root / values[key]) for key in ("model", "data")}
    return load_settings(None, values | places | {"output": str(root / output / name)})


def interrupted_training(settings: Any) -> None:
    """A training that ends when step 3 is logged, with the checkpoint of step 2 behind it."""
    plain = callbacks.Metrics.on_log

    def on_log(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        plain(self, args, state, *rest, **kwargs)
        if state.global_step == 3:
            raise Stopped

    with mock.patch.object(callbacks.Metrics, "on_log", on_log):
        try:
            pissa.train(settings)
        except Stopped:
            return
    raise AssertionError("it was not interrupted")


def save_tokenizer(folder: Path) -> None:
    """One token a letter: the tables of the models stay small."""
    vocabulary = {"</s>": 0} | {letter: index + 1 for index, letter in enumerate(LETTERS)}
    assert len(vocabulary) == SMALL["vocab_size"]
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    words = {"eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **words).save_pretrained(folder)


def make_bases(root: Path) -> None:
    for name, sizes in (("base", {}), ("base64", PACKABLE)):
        build_pico(**SMALL, **sizes).save_pretrained(root / name)
        save_tokenizer(root / name)
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    words = [(n, "good" if n % 2 else "bad") for n in range(20)]
    moods = [{"text": f"{n} is {word}", "label": word} for n, word in words]
    for file, lines in (("words.jsonl", rows), ("moods.jsonl", moods)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / file).write_text(text, encoding="utf-8")


def make_runs(root: Path) -> None:
    for name in checks.RUNS:
        pissa.train(settings_of(root, name, "runs"))
        shutil.rmtree(root / "runs" / name / "checkpoints")
    for name in checks.INTERRUPTED:
        interrupted_training(settings_of(root, name, "interrupted"))
        out = root / "interrupted" / name
        assert json.loads((out / "run.json").read_text())["status"] == "running"
        assert [path.parent.name for path in out.glob("checkpoints/*/whole")] == ["checkpoint-2"]
        pickled = out / "checkpoints" / "checkpoint-2" / "training_args.bin"
        pickled.unlink()  # it holds paths, and nothing reads it
        for file in out.rglob("README.md"):  # empty forms
            file.unlink()


def make_others(root: Path) -> None:
    for name in checks.DECOMPOSED:
        checks.decompose(root, name, root / "decomposed" / name)
    residual = root / "decomposed" / "pissa"
    base = transformers.AutoModelForCausalLM.from_pretrained(residual)
    model = peft.PeftModel.from_pretrained(base, residual / "pissa_init", is_trainable=True)
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model.save_pretrained(root / "trained_by_peft")
    (root / "trained_by_peft" / "README.md").unlink()  # an empty form
    run = root / "runs" / "pissa"
    pissa.convert(run, root / "converted" / "pissa", base=root / "base")
    pissa.convert(run, root / "converted" / "pissa_rank2", 2, base=root / "base")
    pissa.merge(root / "base", run, root / "merged")
    needs = [
        "--needs",
        "covariance,components,inputs",
        "--rank",
        "4",
        "--rows",
        "4",
        "--max-length",
        "32",
    ]
    words = [
        sys.executable,
        "-m",
        "pissa",
        "observe",
        "base",
        "words.jsonl",
        "observations.safetensors",
        *needs,
    ]
    subprocess.run(words, cwd=root, check=True)
    seen = Observations.load(root / "observations.safetensors")
    svdquant(root / "base", root / "w4a4", seen, rank=4, svd="exact", workers=1)


def keep(root: Path) -> None:
    """Copy what was made to lie beside this file, without a word of the place where it was made."""
    assert not any((HERE / part).exists() for part in KEPT), "old folders stay as they are"
    checks.move(root, HERE, KEPT, str(root), PLACE)


def expect(root: Path) -> None:
    """Do everything once, and write down what came out beside what it depends on."""
    checks.place(root)
    found: dict[str, Any] = {}
    for check in checks.CHECKS:
        out = root / "out" / check.id.replace("/", "-")
        out.mkdir(parents=True)
        result = check.run(root, out)
        found[check.id] = checks.described(result)
        print(check.id, len(result), flush=True)
        assert_as_kept(check, result, root)
    told = {"surroundings": checks.surroundings(), "files": checks.kept_files(), "checks": found}
    checks.EXPECTED.write_text(spread(told) + "\n", encoding="utf-8")


def assert_as_kept(check: checks.Check, result: checks.Result, root: Path) -> None:
    """The same tensors as in the kept folder; an interrupted run ends as the one that was not."""
    if check.kind in ("save", "decompose", "resume"):
        folder = "decomposed" if check.kind == "decompose" else "runs"
        for key, tensor in tensors_in(root / folder / check.name).items():
            assert key.startswith("residual/") or torch.equal(tensor, result[key]), (check.id, key)


def spread(value: Any, depth: int = 2) -> str:
    """JSON with an entry a line, down to the tensors."""
    if depth < 0 or not isinstance(value, dict):
        return json.dumps(value)
    lines = [f"{json.dumps(key)}: {spread(one, depth - 1)}" for key, one in value.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[2]).resolve()
    where.mkdir(parents=True)
    if sys.argv[1] == "folders":
        make_bases(where)
        make_runs(where)
        make_others(where)
        keep(where)
    else:
        expect(where)
