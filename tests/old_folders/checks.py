"""What is done with the old folders, through public names alone, and how results are compared.

Every check gives tensors, which are compared by their bits, or JSON values, as they are.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import pissa
from pissa.config import load_settings
from pissa.observe import Observations
from pissa.w4a4 import load_w4a4

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
PLACE = "/OLD_FOLDERS"
"""Stands in the kept files for the absolute path of the folder that holds them."""
TEXTS = (".json", ".jsonl", ".yaml", ".md")
TOLD_BY_AN_ADAPTER = ("r", "lora_alpha", "peft_type", "task_type", "fan_in_fan_out", "bias")
BASES = ("base", "base64", "words.jsonl", "moods.jsonl")
KEPT = (
    *BASES, "runs", "interrupted", "decomposed", "trained_by_peft", "converted", "merged", "w4a4",
    "observations.safetensors",
)  # fmt: skip
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes")
FLAGS = ("avx", "amx", "fma", "f16c", "sse4")
"""Of a processor, by which libraries choose their kernels."""
TOKENS = torch.arange(3, 43).reshape(2, 20)

ON_BASE = (
    "lora",
    "pissa",
    "pissa_residual",
    "pissa_bf16",
    "milora",
    "eva",
    "lora_pro",
    "classification",
)
CORED = ("lora_xs", "svft", "lamda")
"""Their adapter is computed from a core: a product, whose last bits depend on the processor."""
IN_FEW_BITS = ("qpissa", "qlora", "pissa_int8")
CORED_IN_FEW_BITS = ("lora_xs_nf4", "lamda_nf4")
QUANTISED = (*IN_FEW_BITS, *CORED_IN_FEW_BITS)
RUNS = (*ON_BASE, *CORED, *IN_FEW_BITS, *CORED_IN_FEW_BITS)
INTERRUPTED = ("pissa", "lora_xs", "lamda", "lora", "lora_pro", "qpissa", "classification")
DECOMPOSED: dict[str, dict[str, Any]] = {
    "pissa": {"source": "base", "method": "pissa"},
    "lamda": {"source": "base", "method": "lamda"},
    "lora": {"source": "base", "method": "lora"},
    "qpissa": {"source": "base64", "method": "qpissa"},
    "qpissa_bf16": {"source": "base64", "method": "qpissa", "dtype": "bfloat16"},
}
RANK = {"rank": 2, "alpha": 4.0}
"""Of all that is decomposed or trained; the scale of 2 is seen where it is forgotten."""
NEAR = {"float": 1e-4, "half": 1e-2, "whole": 2e-2}
"""Relative differences on another processor; one code of 4 bits may cross a border there."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One thing that is done with one folder.

    Attributes:
        kind: load, resume, convert, merge, inspect, decompose, save, model or observations.
        name: of the folder.
        run: gives the result; takes where the old folders lie, to be read, and an empty folder.
        copies: the results that are copied or computed entry by entry: the same bits everywhere.
        loose: in 4 bits by rounds, which on another processor carry one crossed border on.
    """

    kind: str
    name: str
    run: Callable[[Path, Path], Result]
    copies: Callable[[str], bool] = lambda key: False
    loose: bool = False

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


def place(there: Path, parts: tuple[str, ...] = KEPT) -> Path:
    """Copy old folders and say in their texts where they lie now."""
    move(HERE, there, parts, PLACE, str(there))
    return there


def move(here: Path, there: Path, parts: tuple[str, ...], old: str, new: str) -> None:
    """Copy folders, with another word for the place in their texts."""
    for file in files_of(here, parts):
        copy = there / file.relative_to(here)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        if file.suffix in TEXTS:
            text = copy.read_bytes().decode().replace(old, new)
            copy.write_bytes(text.encode())


def files_of(folder: Path, parts: tuple[str, ...] = KEPT) -> list[Path]:
    """Every file in the parts of a folder, which are files or folders themselves."""
    found = [folder / part for part in parts if (folder / part).is_file()]
    found += [file for part in parts for file in (folder / part).rglob("*") if file.is_file()]
    return sorted(found)


def kept_files() -> dict[str, str]:
    """The digest of each kept file."""
    names = {file.relative_to(HERE).as_posix(): file for file in files_of(HERE)}
    return {name: _digest(names[name].read_bytes()) for name in sorted(names)}


def _digest(content: bytes) -> str:
    """The first half of SHA-256: enough, and there are thousands."""
    return hashlib.sha256(content).hexdigest()[:32]


def surroundings() -> dict[str, Any]:
    """What decides the last bits of products."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        pairs = [line.partition(":") for line in first.splitlines()]
        lines = {key.strip(): value.strip() for key, _, value in pairs}
        facts |= {key: lines.get(key) for key in ("vendor_id", "cpu family", "model")}
        facts["flags"] = sorted(f for f in lines.get("flags", "").split() if f.startswith(FLAGS))
    return facts


def described(result: Result) -> dict[str, Any]:
    """A result as `expected.json` holds it; of a tensor {"dtype shape": [digest, norm, mix]}."""
    tensors = {key: _summary(value) for key, value in result.items() if isinstance(value, Tensor)}
    return result | tensors


def _summary(tensor: Tensor) -> dict[str, list[Any]]:
    flat = tensor.detach().cpu().contiguous().flatten()
    double = flat.double()
    norm = float(torch.linalg.vector_norm(double))
    mix = float((double * torch.arange(len(double), dtype=torch.float64).cos()).sum())
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
    bits = _digest(flat.view(torch.uint8).numpy().tobytes())
    return {kind: [bits, _short(norm), _short(mix)]}


def _short(number: float) -> float:
    return float(f"{number:.9g}")


def differences(check: Check, got: Result, expected: Result, *, same: bool) -> list[str]:
    """What is not as it was, in words; bits count on the same processor and for what is copied."""
    found = [f"{key} is absent" for key in expected if key not in got]
    found += [f"{key} is new" for key in got if key not in expected]
    for key in expected.keys() & got.keys():
        old, new = expected[key], got[key]
        if not _is_summary(old) or not _is_summary(new) or list(new) != list(old):
            found += [f"{key} is {new!r}, was {old!r}"] if new != old else []
            continue
        (kind, (bits, *numbers)), (_, (new_bits, *new_numbers)) = *old.items(), *new.items()
        steps = [abs(a - b) for a, b in zip(new_numbers, numbers, strict=True)]
        distance = max(steps) / max(numbers[0], 1e-30)
        exactly = same or check.copies(key)
        near = NEAR["whole"] if check.loose else _tolerance(kind)
        if (new_bits != bits) if exactly else not distance <= near:
            bits_count = ", and its bits count" if exactly else ""
            found.append(f"{key} is {distance:.1e} from what it was{bits_count}")
    return sorted(found)


def _is_summary(value: Any) -> bool:
    whole = isinstance(value, dict) and len(value) == 1
    return whole and all(isinstance(told, list) for told in value.values())


def _tolerance(kind: str) -> float:
    """By dtype."""
    if kind.startswith(("bfloat16", "float16")):
        return NEAR["half"]
    return NEAR["float" if kind.startswith("float") else "whole"]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files below a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    found = {}
    for file in files:
        name = file.relative_to(folder).as_posix()
        found |= {f"{name}: {key}": tensor for key, tensor in load_file(file).items()}
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def model_for(root: Path, name: str) -> nn.Module:
    """What a run was trained on."""
    folder = base_of(root, name)
    dtype = torch.bfloat16 if name == "pissa_bf16" else "auto"
    if name == "classification":
        auto, more = transformers.AutoModelForSequenceClassification, {"num_labels": 2}
    else:
        auto, more = transformers.AutoModelForCausalLM, {}
    return auto.from_pretrained(folder, dtype=dtype, **more).eval()


def base_of(root: Path, name: str) -> Path:
    """The folder that a run is served on."""
    return root / "runs" / name / "residual" if name in QUANTISED else root / "base"


def _loaded(model: nn.Module, folder: Path) -> Result:
    loaded = pissa.load(model, folder, trainable=False)
    plain = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    return {"logits": logits(loaded), **plain}


def _load_run(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        return _loaded(model_for(root, name), root / "runs" / name)

    plain = name in ON_BASE + IN_FEW_BITS
    return Check("load", f"runs/{name}", run, lambda key: key != "logits" and plain)


def _load_decomposed(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        folder = root / "decomposed" / name
        return _loaded(transformers.AutoModelForCausalLM.from_pretrained(folder), folder)

    return Check("load", f"decomposed/{name}", run, lambda key: key != "logits" and name != "lamda")


def _load_plain(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        return _loaded(model_for(root, "pissa"), root / name)

    return Check("load", name, run, lambda key: key != "logits")


def _resume(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        folder = place(out, (*BASES, f"interrupted/{name}")) / "interrupted" / name
        record = pissa.train(load_settings(folder / "settings.yaml", {}), resume=True)
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        result: Result = {"status": record["status"], "steps": record["steps"]}
        for key in ("loss", "eval_loss"):
            having = [line for line in lines if key in line]
            result[f"steps with {key}"] = [line["step"] for line in having]
            result[key] = torch.tensor([line[key] for line in having], dtype=torch.float64)
        for part in ("adapter", "state"):
            result |= {f"{part}/{key}": tensor for key, tensor in tensors_in(folder / part).items()}
        return result

    return Check("resume", name, run)


def _convert(source: str, rank: int | None = None, start: str | None = None) -> Check:
    def run(root: Path, out: Path) -> Result:
        base = root / original(source)
        begun = root / start if start else None
        record = pissa.convert(root / source, out / "lora", rank, start=begun, base=base)
        config = json.loads((out / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
        told = {key: config[key] for key in TOLD_BY_AN_ADAPTER}
        told |= {
            "target_modules": sorted(config["target_modules"]),
            "base": _anywhere(config, root),
        }
        result = {"config": told, "rank": record.notes["rank"], **tensors_in(out / "lora")}
        result["error"] = torch.tensor(record.notes["error"], dtype=torch.float64)
        return result

    name = source if rank is None else f"{source} at rank {rank}"
    exact = rank is None and source.rpartition("/")[2] not in CORED
    return Check("convert", name, run, lambda key: exact)


def _anywhere(config: dict[str, Any], root: Path) -> str:
    return config["base_model_name_or_path"].replace(str(root), PLACE)


def _merge(source: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        base = base_of(root, source.removeprefix("runs/"))
        pissa.merge(base, root / source, out / "merged")
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
        return {"logits": logits(model)} | tensors_in(out / "merged")

    return Check("merge", source, run)


def _merge_by_command(root: Path, out: Path) -> Result:
    """`pissa merge`, which writes the dense weights of a model in 4 bits."""
    command = ["pissa", "merge", str(root / "base"), str(root / "w4a4"), str(out / "dense")]
    with mock.patch.object(sys, "argv", command), warnings.catch_warnings():
        try:
            runpy.run_module("pissa", run_name="__main__")
        except SystemExit as end:
            status = end.code
    return {"status": status} | tensors_in(out / "dense")


def _inspect(name: str, base: str | None = None) -> Check:
    def run(root: Path, out: Path) -> Result:
        report = pissa.inspect(root / name, root / base if base else None).to_json()
        told = {key: report[key] for key in ("kind", "safe_to_serve", "base_check")}
        recipe = report["recipe"]
        told |= {key: recipe.get(key) for key in ("method", "rank", "alpha", "svd", "quant")}
        told |= {"layers": len(report["layers"]), "base": report["base"].get("name")}
        return json.loads(json.dumps(told).replace(str(root), PLACE))

    return Check("inspect", name, run)


def _decompose(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        decompose(root, name, out / "out")
        return tensors_in(out / "out")

    return Check("decompose", name, run, loose="qpissa" in name)


def decompose(root: Path, name: str, out: Path) -> None:
    settings = dict(DECOMPOSED[name])
    pissa.decompose(root / settings.pop("source"), out, svd="exact", workers=1, **RANK, **settings)


def _save(name: str) -> Check:
    def run(root: Path, out: Path) -> Result:
        pissa.save(pissa.load(model_for(root, name), root / "runs" / name), out / "run")
        return tensors_in(out / "run")

    cored = name in CORED + CORED_IN_FEW_BITS
    return Check("save", name, run, lambda key: key.startswith("state/") or not cored)


def _w4a4(root: Path, out: Path) -> Result:
    model = load_w4a4(root / "w4a4")
    state = {f"state {name}": tensor for name, tensor in model.state_dict().items()}
    return {"logits": logits(model), **state}


def _merged(root: Path, out: Path) -> Result:
    return {"logits": logits(transformers.AutoModelForCausalLM.from_pretrained(root / "merged"))}


def _observations(root: Path, out: Path) -> Result:
    seen = Observations.load(root / "observations.safetensors")
    result: Result = {"weights": sorted(seen.base), "needs": sorted(seen.seen)}
    for name in seen.base:
        result |= {f"{need} {name}": seen.get(need, name) for need in ("covariance", "inputs")}
        found = seen.get("components", name)
        result |= {f"{part} {name}": getattr(found, part) for part in ("mean", "values", "vectors")}
        result |= {f"{part} {name}": getattr(found, part) for part in ("rows", "energy")}
    return result


def original(name: str) -> str:
    """The model that a run began with."""
    return "base64" if name.rpartition("/")[2] in QUANTISED else "base"


PLAIN = ("converted/pissa", "converted/pissa_rank2")
CHECKS: tuple[Check, ...] = (
    *(_load_run(name) for name in RUNS),
    *(_load_decomposed(name) for name in DECOMPOSED),
    *(_load_plain(name) for name in PLAIN),
    *(_resume(name) for name in INTERRUPTED),
    *(_convert(f"runs/{name}") for name in (*ON_BASE, "lora_xs", "lamda")),
    *(_convert(f"runs/{name}", 2) for name in ("pissa", "svft", *IN_FEW_BITS, *CORED_IN_FEW_BITS)),
    _convert("trained_by_peft", start="decomposed/pissa/pissa_init"),
    _convert("trained_by_peft", 2, start="decomposed/pissa/pissa_init"),
    *(_merge(f"runs/{name}") for name in RUNS if name != "classification"),
    *(_merge(name) for name in PLAIN),
    Check("merge", "w4a4", _merge_by_command),
    *(_inspect(f"runs/{name}", original(name)) for name in RUNS),
    *(_inspect(f"runs/pissa/{part}") for part in ("adapter", "state")),
    *(_inspect(f"runs/qpissa/{part}") for part in ("adapter", "state")),
    *(_inspect(f"interrupted/{name}", original(name)) for name in INTERRUPTED),
    *(_inspect(f"decomposed/{name}", str(one["source"])) for name, one in DECOMPOSED.items()),
    *(_inspect(f"decomposed/{name}/pissa_init") for name in DECOMPOSED),
    *(_inspect(name, "base") for name in (*PLAIN, "trained_by_peft", "w4a4")),
    *(_inspect(name) for name in ("merged", "base")),
    *(_decompose(name) for name in DECOMPOSED),
    *(_save(name) for name in RUNS),
    Check("model", "w4a4", _w4a4, lambda key: key != "logits"),
    Check("model", "merged", _merged),
    Check("observations", "observations", _observations, lambda key: True),
)
