"""What a folder is, and the change it stands for: the first question of convert, merge and inspect."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from pissa.adapters import plain
from pissa.adapters.plain import INIT
from pissa.adapters.state import STATE, check_finished, read_state
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError, WrongBaseError
from pissa.records import Record
from pissa.splits import Lora
from pissa.surgery.packing import is_residual
from pissa.untyped import Json

STARTS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")
PRINCIPAL = 0.5
RESIDUAL = "residual"
"""Where a run keeps the residual that was made for it."""


@dataclass(frozen=True)
class Changes:
    """What a run or an adapter changes in its base.

    Attributes:
        changes: each target's change, scale folded in.
        extras: tensors of modules that trained whole, under their names in an adapter file.
        record: what made it; None for an adapter of unknown origin.
        config: of the adapter, where there is one.
    """

    changes: dict[Target, Lora]
    extras: dict[str, Tensor] = field(default_factory=dict)
    record: Record | None = None
    config: Json = field(default_factory=dict)


def kind_of_folder(path: Path) -> str:
    """One of: run, state, lora, init, raw-adapter, foreign-adapter, decomposed, foreign-decomposed,
    merged, w4a4, model.

    "raw" is an adapter that only means something beside its own residual; "foreign" has no
    pissa.json.

    Raises:
        CheckpointError: none of these.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: give a model, a run or an adapter on disk")
    if (path / "state" / STATE).is_file():
        return "run"
    if (path / STATE).is_file():
        return "state"
    record = read_json(path / plain.RECORD) if (path / plain.RECORD).is_file() else {}
    if (path / INIT / plain.CONFIG).is_file():
        return "decomposed" if record.get("kind") == "residual" else "foreign-decomposed"
    if (path / plain.CONFIG).is_file():
        if record.get("kind") in ("lora", "init"):
            return str(record["kind"])
        config = read_json(path / plain.CONFIG)
        return (
            "raw-adapter"
            if _changes_its_base(config) or _trained_on_residual(config)
            else "foreign-adapter"
        )
    if record.get("kind") in ("merged", "w4a4"):
        return str(record["kind"])
    if (path / "config.json").is_file():
        return "model"
    raise CheckpointError(
        f"{path} holds no config.json, adapter_config.json or state: it is no model, run or adapter"
    )


def read_changes(path: Path, *, on_residual: bool = False) -> Changes:
    """The change that a run, a state or a plain LoRA stands for.

    Args:
        path: its folder.
        on_residual: whether it will meet a residual, beside which an adapter that stock tools
            trained is right too.

    Raises:
        WrongBaseError: an adapter that is only right beside its own residual.
        CheckpointError: a folder that stands for no change.
    """
    kind = kind_of_folder(path)
    check_finished(path)
    if kind in ("run", "state"):
        state = read_state(path / "state" if kind == "run" else path)
        return Changes(state.changes(), state.extras, state.record)
    if kind in ("lora", "foreign-adapter") or (on_residual and kind in ("raw-adapter", "init")):
        return _read_plain(path, kind)
    if kind in ("raw-adapter", "init"):
        raise WrongBaseError(
            f"{path} is only right beside the residual it was made with, and wrong on the original model. If it was "
            f"trained: pissa convert {path} OUT --start PISSA_INIT_DIR, with the start it was trained from"
        )
    if kind == "w4a4":
        raise CheckpointError(
            f"{path} is a model in 4 bits, which no adapter holds: pissa merge BASE {path} OUT writes it in 16 bits"
        )
    raise CheckpointError(
        f"{path} is a {kind} folder, expected a run, its state/ or a LoRA adapter"
    )


def adapter_targets(config: Json, checkpoint: Checkpoint) -> dict[Target, tuple[Tensor, Tensor]]:
    """(left, right) of each weight of an adapter file, with the kind told from the stored names and shapes."""
    pairs: dict[Target, tuple[Tensor, Tensor]] = {}
    for name, info in checkpoint.tensors.items():
        module, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        if side not in ("A.weight", "embedding_A"):
            continue
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.folder / plain.WEIGHTS} holds `{name}` but not `{other}`"
            )
        rows, columns = checkpoint.tensors[other].shape[0], info.shape[1:]
        if side == "embedding_A":
            target = Target(module, "embedding", (columns[0], rows))
        elif len(info.shape) == 4:
            target = Target(module, "conv2d", (rows, *columns))
        elif config.get("fan_in_fan_out"):
            target = Target(module, "conv1d", (columns[0], rows))
        else:
            target = Target(module, "linear", (rows, columns[0]))
        pairs[target] = (checkpoint.read(other).flatten(1), checkpoint.read(name).flatten(1))
    return pairs


def adapter_scale(config: Json, where: Path) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; refuses what a plain pair does not say."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    one_scale = not config.get("use_rslora") and ranks.keys() == alphas.keys()
    alpha, rank = float(config["lora_alpha"]), float(config["r"])
    scale = alpha / rank
    if one_scale and all(
        abs(alphas[layer] / own - scale) < 1e-9 * scale for layer, own in ranks.items()
    ):
        ranks = alphas = {}  # ranks of their own, as the shapes say, and one scale everywhere
    unsupported = [key for key in ("use_dora", "lora_bias") if config.get(key)]
    unsupported += [
        key for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if pattern
    ]
    if unsupported:
        raise CheckpointError(
            f"{where / plain.CONFIG} sets {', '.join(unsupported)}, which is not plain LoRA: merge it with peft instead"
        )
    return alpha / rank**0.5 if config.get("use_rslora") else scale


def principal_share(weight: Tensor, change: Lora) -> float:
    """``<W, BA> / |BA|^2``: near 1 for a pair that holds a part of W itself, near 0 for a change of
    it.

    A principal adapter that lost its config (`init_lora_weights` set to true by hand) looks like a
    plain LoRA in every other way.

    Args:
        weight: [out, in] of the base.
        change: the adapter's pair, scale folded in.
    """
    inside = (change.B.double() * (weight.double() @ change.A.double().T)).sum()
    square = ((change.B.T @ change.B).double() * (change.A @ change.A.T).double()).sum()
    return float(inside / square) if square > 0 else 0.0


def refuse_principal(path: Path, shares: list[float], base: str) -> None:
    """Raise if an adapter of unknown origin holds the base's own principal part.

    Raises:
        WrongBaseError: with what to do.
    """
    mean = sum(shares) / max(len(shares), 1)
    if mean > PRINCIPAL:
        raise WrongBaseError(
            f"{path} holds a part of the weights of {base} itself ({mean:.0%} of its product lies in them; a change "
            "has about 0 %): it was trained beside a residual and is wrong on the original model. Convert it first: "
            f"pissa convert {path} OUT --start PISSA_INIT_DIR"
        )


def _read_plain(path: Path, kind: str) -> Changes:
    config = read_json(path / plain.CONFIG)
    record = None
    if kind in ("lora", "init"):
        record = Record.from_json(read_json(path / plain.RECORD), str(path / plain.RECORD))
        if kind == "init":
            record = dataclasses.replace(
                record, notes={**record.notes, "residual": str(path.resolve().parent)}
            )
    else:
        warnings.warn(
            f"{path} has no pissa.json: the base it was made for cannot be checked", stacklevel=3
        )
    scale = adapter_scale(config, path)
    checkpoint = Checkpoint.open(path, need_config=False)
    pairs = adapter_targets(config, checkpoint)
    extras = {name: checkpoint.read(name) for name in checkpoint.tensors if ".lora_" not in name}
    changes = {target: Lora(right, scale * left) for target, (left, right) in pairs.items()}
    return Changes(changes, extras, record, config)


def _changes_its_base(config: Json) -> bool:
    start = config.get("init_lora_weights", True)
    return isinstance(start, str) and start.lower().startswith(STARTS_THAT_CHANGE_THE_BASE)


def _trained_on_residual(config: Json) -> bool:
    """Whether the base that the adapter names is a decomposed folder on this machine."""
    base = Path(str(config.get("base_model_name_or_path") or ""))
    if not (base / "config.json").is_file():
        return False
    return (base / INIT).is_dir() or is_residual(read_json(base / "config.json"))
