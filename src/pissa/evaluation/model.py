"""The model that a folder stands for, in a backend of the harness, and which weights these are."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pissa.adapters import plain
from pissa.checkpoint.output import read_json
from pissa.errors import CheckpointError, ConfigError, InputError, MissingExtraError, WrongBaseError, require
from pissa.reports.commands import served_rank
from pissa.surgery.folders import kind_of_folder
from pissa.surgery.inspection import inspect
from pissa.training.opening import HUB, HUB_ID, Opened, open_model

BACKENDS = ("hf", "vllm")
CHUNK = 2**24


@dataclass
class Subject:
    """A model to evaluate; its weights are loaded at the first use and dropped by `close`.

    Attributes:
        name: in tables and folders.
        path: a run, an adapter, a model, or a Hub id.
        base: where its base lies, if not where its record says.
        identity: which weights; the same for the same files.
        template: of the training; None where nothing is known.
    """

    name: str
    path: str
    base: str | None
    identity: dict[str, Any]
    template: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    _opened: Opened | None = field(default=None, repr=False)

    def open(self) -> Opened:
        """The model on its base, checked."""
        if self._opened is None:
            self._opened = open_model(
                self.path,
                base=self.base,
                device=self.device,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            )
        return self._opened

    def close(self) -> None:
        """Let the weights go."""
        self._opened = None


def subject(path: str, *, base: str | None = None, **loading: Any) -> Subject:
    """What is known of a model before its weights are loaded.

    Args:
        path: a folder, or a Hub id.
        base: where its base lies, if not where its record says.
        loading: device, dtype and trust_remote_code of `pissa.training.opening.open_model`.

    Raises:
        CheckpointError: nothing that could be evaluated.
        InputError: a classifier.
    """
    folder = Path(path)
    if HUB_ID.fullmatch(path) and not folder.exists():
        identity = {"path": path, "kind": HUB, "revision": _commit(path, bool(loading.get("trust_remote_code")))}
        return Subject(path.replace("/", "--"), path, base, identity, **loading)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    identity = {"path": path, "kind": "run" if record else kind_of_folder(folder), "sha256": _digest(folder)}
    template = record.get("data", {}).get("template")
    return Subject(folder.resolve().name, path, base, identity, template, **loading)


def base_of(subject: Subject) -> str | None:
    """The original model of a run or an adapter, where it is still there; None for a whole model."""
    folder = Path(subject.path)
    file = next(
        (f for f in (folder / "state" / plain.RECORD, folder / plain.RECORD) if f.is_file()), folder / "run.json"
    )
    if subject.identity["kind"] in ("model", HUB, "w4a4") or not file.is_file():
        return None
    said = read_json(file).get("base") or {}
    name = subject.base or said.get("name")
    return str(name) if name and (Path(name).is_dir() or not Path(name).is_absolute()) else None


def harness_model(subject: Subject, backend: str, batch_size: int) -> Any:
    """An `HFLM` or `VLLM` of the harness.

    Raises:
        WrongBaseError: run and base do not belong together.
        MissingExtraError: no lm-eval, or no vllm, with the command to type where there is one.
    """
    if backend == "vllm":
        return _vllm(subject, batch_size)
    huggingface = require("lm_eval.models.huggingface", "eval")
    opened = subject.open()
    return huggingface.HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        backend="causal",
        batch_size=batch_size,
        device=str(next(opened.model.parameters()).device),
        softmax_dtype="float32",  # else a 16-bit model's log-likelihoods are summed in 16 bits: -1542 becomes -1544
    )


def vllm_arguments(subject: Subject) -> dict[str, Any]:
    """The harness's arguments for vLLM: a run is served as its plain LoRA on its base, prefixes are shared.

    Raises:
        InputError: nothing that vLLM could serve.
        WrongBaseError: run and base do not belong together.
    """
    folder, kind = Path(subject.path), subject.identity["kind"]
    shared: dict[str, Any] = {"dtype": subject.dtype or "auto", "enable_prefix_caching": True}
    if kind in (HUB, "model", "merged"):
        return {"pretrained": subject.path, **shared}
    if kind == "run" and not (folder / "adapter").is_dir():
        return {"pretrained": str(folder / "model"), **shared}
    if kind not in ("run", "lora"):
        raise InputError(f"{folder} is a {kind} folder, which vLLM does not serve: pissa merge it, or use --backend hf")
    adapter = folder / "adapter" if kind == "run" else folder
    config = read_json(adapter / plain.CONFIG)
    base = subject.base or str(config["base_model_name_or_path"])
    if Path(base).is_dir() and (said := inspect(adapter, base=base).base_check) not in ("same", "not checked"):
        raise WrongBaseError(said)
    rank = served_rank(int(config["r"]))
    return {"pretrained": base, "lora_local_path": str(adapter), "max_lora_rank": rank, **shared}


def vllm_command(subject: Subject, tasks: list[str], folder: Path) -> str:
    """The same evaluation by the harness's own command, on a machine that has vLLM."""
    arguments = ",".join(f"{key}={value}" for key, value in vllm_arguments(subject).items())
    return (
        f"lm_eval run --model vllm --model_args {shlex.quote(arguments)} --tasks {','.join(tasks)} "
        f"--include_path {shlex.quote(str(folder))} --batch_size auto"
    )


def check_backend(backend: str, subjects: list[Subject], tasks: list[str], folder: Path) -> None:
    """Raise before anything is loaded where a backend is unknown, or vllm is not installed."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "vllm" and find_spec("vllm") is None:
        commands = "\n  ".join(vllm_command(one, tasks, folder) for one in subjects)
        raise MissingExtraError(
            f"vllm is not installed here. Where it is (pip install 'lm-eval[vllm]'):\n  {commands}\nor use --backend hf"
        )


def _commit(name: str, trust_remote_code: bool) -> str | None:
    """Which commit of a Hub model this machine sees."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} is neither a folder nor a model that the Hub gives here: {error}") from error
    return getattr(config, "_commit_hash", None)


def _vllm(subject: Subject, batch_size: int) -> Any:
    models: Any = require("lm_eval.models.vllm_causallms", "eval")
    return models.VLLM(**vllm_arguments(subject), batch_size=batch_size)


def _digest(folder: Path) -> str:
    """Of all weights and configs that a folder holds, hidden ones and checkpoints of a training aside."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.suffix in (".safetensors", ".json") and not _aside(inside) and file.is_file():
            digest.update(f"{inside}\n".encode())
            _feed(file, digest.update)
    return digest.hexdigest()


def _aside(inside: Path) -> bool:
    return any(part.startswith(".") or part in ("checkpoints", "trainer") for part in inside.parts)


def _feed(file: Path, update: Callable[[bytes], None]) -> None:
    with file.open("rb") as stream:
        while piece := stream.read(CHUNK):
            update(piece)
