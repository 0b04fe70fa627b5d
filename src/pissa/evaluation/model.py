"""The model that a folder stands for, in a backend of the harness, and which weights these are."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from pissa.adapters import plain
from pissa.checkpoint.output import read_json
from pissa.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MissingExtraError,
    OutputError,
    WrongBaseError,
    require,
)
from pissa.evaluation.tracks import Protocol
from pissa.records import Base, Record
from pissa.reports.commands import served_rank
from pissa.surgery.folders import kind_of_folder
from pissa.surgery.inspection import inspect
from pissa.training.opening import HUB, HUB_ID, Opened, find_model, open_model
from pissa.untyped import Json

BACKENDS = ("hf", "vllm")
DTYPES = ("float32", "bfloat16", "float16")
TALK = (".md", ".html", ".png", ".svg", ".jpg", ".pdf")
"""Endings of files that are for people."""


@dataclass
class Subject:
    """A model to evaluate; its weights are loaded at the first use and dropped by `close`.

    Attributes:
        name: in tables and folders.
        path: a run, an adapter, a model, or a Hub id.
        base: where its base lies, if not where its record says.
        identity: which weights; the same for the same files.
        revision: of a Hub model.
        template: of the training; None where nothing is known.
        device, dtype, trust_remote_code: as `pissa.training.opening.open_model` takes them.
    """

    name: str
    path: str
    base: str | None
    identity: Json
    revision: str | None = None
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
                revision=self.revision,
                device=self.device,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
            )
        return self._opened

    def close(self) -> None:
        """Let the weights go."""
        self._opened = None


def subject(
    path: str, *, base: str | None = None, revision: str | None = None, **loading: Any
) -> Subject:
    """What is known of a model before its weights are loaded.

    Args:
        path: a folder, or a Hub id.
        base: where its base lies, if not where its record says.
        revision: of a Hub model.
        loading: device, dtype and trust_remote_code of `pissa.training.opening.open_model`.

    Raises:
        CheckpointError: no model, run or adapter.
    """
    folder = Path(path)
    if HUB_ID.fullmatch(path) and not folder.exists():
        commit = _commit(path, revision, bool(loading.get("trust_remote_code")))
        identity = {"path": path, "kind": HUB, "revision": commit}
        return Subject(path.replace("/", "--"), path, base, identity, revision, **loading)
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    identity = {
        "path": path,
        "kind": "run" if record else kind_of_folder(folder),
        "sha256": _digest(folder),
    }
    loading["dtype"] = loading.get("dtype") or record.get("settings", {}).get("dtype")
    template = record.get("data", {}).get("template")
    return Subject(folder.resolve().name, path, base, identity, template=template, **loading)


def check_subject(one: Subject) -> None:
    """Raise for what is there and can answer nothing: an unfinished run, a classifier, an adapter
    without its base.

    Raises:
        InputError, CheckpointError: as `open_model`.
    """
    if one.identity["kind"] != HUB:
        find_model(Path(one.path), one.base)


def refuse_inside(output: Path, models: Sequence[Subject]) -> None:
    """Raise OutputError for a place in a model's folder: a file there would change the model's digest."""
    for one in models:
        folder = Path(one.path).resolve()
        if folder.is_dir() and output.resolve().is_relative_to(folder):
            raise OutputError(
                f"{output} is or lies inside {one.path}, which is compared: choose another folder"
            )


def record_of(one: Subject) -> Record | None:
    """What made the folder, with the base it was made from; None where nothing is on record."""
    folder = Path(one.path)
    for file in (folder / "state" / plain.RECORD, folder / plain.RECORD):
        if file.is_file():
            record = Record.from_json(read_json(file), str(file))
            return record if record.base else None
    said = read_json(folder / "run.json").get("base") if (folder / "run.json").is_file() else None
    return (
        Record("run", base=Base(said["name"], said["revision"], "", said["tensors"]))
        if said
        else None
    )


def base_of(one: Subject) -> tuple[str, str | None] | None:
    """Name and revision of a run's or an adapter's original model; None for a whole model, and where it is gone."""
    record = record_of(one)
    if record is None or record.base is None or one.identity["kind"] in ("model", HUB):
        return None
    name, revision = record.base.name, record.base.revision
    if one.base and not record.beside:
        name, revision = one.base, None
    return (name, revision) if name and (Path(name).is_dir() or HUB_ID.fullmatch(name)) else None


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


def vllm_arguments(subject: Subject) -> Json:
    """The harness's arguments for vLLM: a run is served as its plain LoRA on its base, prefixes are
    shared.

    Raises:
        InputError: nothing that vLLM could serve.
        WrongBaseError: run and base do not belong together.
    """
    folder, kind = Path(subject.path), subject.identity["kind"]
    shared: dict[str, Any] = {"dtype": subject.dtype or "auto", "enable_prefix_caching": True}
    if subject.trust_remote_code:
        shared["trust_remote_code"] = True
    if subject.revision:
        shared["revision"] = subject.revision
    if kind in (HUB, "model", "merged"):
        return {"pretrained": subject.path, **shared}
    if kind == "run" and not (folder / "adapter").is_dir():
        return {"pretrained": str(folder / "model"), **shared}
    if kind not in ("run", "lora"):
        raise InputError(
            f"{folder} is a {kind} folder, which vLLM does not serve: pissa merge it, or use --backend hf"
        )
    adapter = folder / "adapter" if kind == "run" else folder
    config = read_json(adapter / plain.CONFIG)
    base = subject.base or str(config["base_model_name_or_path"])
    if Path(base).is_dir() and (said := inspect(adapter, base=base).base_check) not in (
        "same",
        "not checked",
    ):
        raise WrongBaseError(said)
    rank = served_rank(int(config["r"]))
    return {"pretrained": base, "lora_local_path": str(adapter), "max_lora_rank": rank, **shared}


def vllm_command(
    subject: Subject, protocols: Sequence[Protocol], folder: Path, limit: int | None
) -> str:
    """The same questions by the harness's own command, on a machine that has vLLM; it takes them from the Hub."""
    arguments = ",".join(f"{key}={value}" for key, value in vllm_arguments(subject).items())
    words = ["lm_eval", "run", "--model", "vllm", "--model_args", shlex.quote(arguments)]
    words += ["--tasks", ",".join(asks.harness for asks in protocols if asks.harness)]
    words += ["--include_path", shlex.quote(str(folder)), "--batch_size", "auto"]
    words += ["--limit", str(limit)] if limit else []
    words += ["--confirm_run_unsafe_code"] if any(asks.runs_code for asks in protocols) else []
    return " ".join(words)


def check_backend(
    backend: str,
    subjects: Sequence[Subject],
    protocols: Sequence[Protocol],
    folder: Path,
    limit: int | None,
) -> None:
    """Raise before anything is loaded where a backend is unknown, or vllm is not installed."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "vllm" and find_spec("vllm") is None:
        commands = "\n  ".join(vllm_command(one, protocols, folder, limit) for one in subjects)
        left_out = [asks.task for asks in protocols if not asks.harness]
        without = (
            f" (without {', '.join(left_out)}, which lm_eval does not ask)" if left_out else ""
        )
        raise MissingExtraError(
            f"vllm is not installed here. Where it is (pip install 'lm-eval[vllm]'){without}:\n  {commands}\n"
            "or use --backend hf"
        )


def _commit(name: str, revision: str | None, trust_remote_code: bool) -> str | None:
    """Which commit of a Hub model this machine sees."""
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a model that the Hub gives here: {error}"
        ) from error
    return getattr(config, "_commit_hash", None)


def _vllm(subject: Subject, batch_size: int) -> Any:
    models: Any = require("lm_eval.models.vllm_causallms", "eval")
    return models.VLLM(**vllm_arguments(subject), batch_size=batch_size)


def _digest(folder: Path) -> str:
    """Of all that a folder holds and that could change an answer: weights, configs, tokenizer, code."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and file.suffix not in TALK and not _aside(inside):
            with file.open("rb") as stream:
                digest.update(
                    f"{inside} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
                )
    return digest.hexdigest()


def _aside(inside: Path) -> bool:
    return any(part.startswith(".") or part in ("checkpoints", "trainer") for part in inside.parts)
