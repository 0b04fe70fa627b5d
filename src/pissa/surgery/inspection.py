"""What is this folder, which base does it need, is it safe to serve, and what did the split keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from pissa.adapters import plain
from pissa.adapters.plain import INIT
from pissa.adapters.state import RECORD, check_finished
from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton, parameter_names, stored_targets
from pissa.checkpoint.targets import Target
from pissa.errors import CheckpointError, InputError, PissaError, WrongBaseError
from pissa.jobs import Progress
from pissa.linalg import product_singular_values
from pissa.records import Record
from pissa.splits import Lora
from pissa.surgery.convert import check_folder
from pissa.surgery.folders import (
    adapter_scale,
    adapter_targets,
    kind_of_folder,
    principal_share,
    read_changes,
    refuse_principal,
)
from pissa.surgery.packing import is_residual
from pissa.surgery.pipeline import check_workers
from pissa.surgery.quantisation_errors import quantisation_errors
from pissa.untyped import Json

MEANING = {
    "run": (
        "a training run: adapter/ is a plain LoRA, state/ is for going on",
        "serve its adapter/ folder",
    ),
    "state": ("the state of a run", "no: serve the adapter/ folder beside it"),
    "lora": ("a plain LoRA adapter for the original base", "yes, on the original base"),
    "init": ("the start of a decomposition", "no: only right beside the residual one folder up"),
    "raw-adapter": (
        "an adapter that changes its base when it is loaded",
        "no: convert it with --start first",
    ),
    "foreign-adapter": (
        "a LoRA adapter of unknown origin",
        "only if it was trained on the base you serve",
    ),
    "decomposed": ("a residual model with its start in pissa_init/", "only both together"),
    "foreign-decomposed": (
        "a residual model that another tool made, start in pissa_init/",
        "only both together",
    ),
    "merged": ("a merged model", "yes, as any model"),
    "w4a4": (
        "a model in 4 bits, activations too",
        "with pissa.w4a4.load_w4a4; pissa merge makes a model of 16 bits",
    ),
    "model": ("a model", "yes, as any model"),
}
ON_RESIDUAL = {
    "run": (
        "a training run beside a residual in {quant}",
        "serve its adapter/ on {residual}, or merge both",
    ),
    "state": (
        "the state of a run beside a residual in {quant}",
        "no: serve the adapter/ folder beside it",
    ),
    "lora": (
        "a LoRA adapter for a residual in {quant}",
        "only on {residual}, not on the original base",
    ),
    "init": (
        "the start beside a residual in {quant}",
        "no: only right beside that residual, one folder up",
    ),
    "decomposed": ("a residual in {quant} with its start in pissa_init/", "only both together"),
}
"""Of what was made around a quantised residual."""


@dataclass
class Report:
    """What `pissa inspect` says.

    Attributes:
        path: the folder.
        kind: see `pissa.surgery.folders.kind_of_folder`.
        what: the kind in words.
        safe_to_serve: in words.
        base: the base it needs, with revision and fingerprint.
        recipe: how it was split.
        base_check: "same", the error's text, or "not checked".
        layers: per weight: name, shape, rank, energy, error, singular_values.
        errors: see `pissa.surgery.quantisation_errors`; only where asked for.
    """

    path: str
    kind: str
    what: str
    safe_to_serve: str
    base: Json = field(default_factory=dict)
    recipe: Json = field(default_factory=dict)
    base_check: str = "not checked"
    layers: list[Json] = field(default_factory=list)
    errors: list[Json] = field(default_factory=list)

    def to_json(self) -> Json:
        """A JSON object."""
        return asdict(self)


def inspect(
    path: str | Path,
    base: str | Path | None = None,
    *,
    errors: bool = False,
    text: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Say what a folder is; with `base`, whether it belongs to that model.

    Args:
        path: any model, run or adapter folder.
        base: a model folder to compare fingerprints with.
        errors: also compute how far a quantised residual is from its base; the base is the one on
            record by default.
        text: a text file, to compute the errors of the layers' outputs on it too; loads the whole
            base.
        workers: weights worked on side by side for the errors.
        progress: told of every weight of the errors.

    Raises:
        CheckpointError: the folder is none of these, or damaged.
        InputError: errors are asked of what is no quantised residual.
        WrongBaseError: errors are asked against another base.
    """
    path = Path(path)
    errors = errors or text is not None
    kind = kind_of_folder(path)
    record = _record_of(path, kind)
    report = Report(str(path), kind, *_meaning(kind, record))
    try:
        check_finished(path)
    except CheckpointError as error:
        report.safe_to_serve = f"no: {error}"
    if errors:
        report.errors = _errors(path, kind, record, base, text, workers, progress)
    if record is not None:
        if record.base:
            report.base = {
                key: value for key, value in asdict(record.base).items() if key != "tensors"
            }
        if record.recipe:
            left_out = {"targets"} | (
                set() if record.recipe.quant else {"quant", "double_quant", "iterations"}
            )
            left_out |= {key for key in ("options", "ranks") if not getattr(record.recipe, key)}
            report.recipe = {
                key: value for key, value in asdict(record.recipe).items() if key not in left_out
            }
        report.layers = [asdict(layer) for layer in record.layers]
        if base is not None:
            try:
                _check_base(record, kind, Path(base), str(path))
                report.base_check = "same"
            except PissaError as error:
                report.base_check = str(error)
    plain_pair = kind in ("lora", "foreign-adapter") and not report.layers
    changes = read_changes(path).changes if plain_pair else {}
    if changes:
        report.layers = _change_layers(changes)
    elif kind in ("raw-adapter", "foreign-decomposed"):
        report.layers = _pair_layers(path if kind == "raw-adapter" else path / INIT)
    if kind == "foreign-adapter" and base is not None:
        try:
            refuse_principal(path, _shares(changes, Path(base)), str(base))
        except WrongBaseError as error:
            report.kind, report.base_check = "raw-adapter", str(error)
            report.what, report.safe_to_serve = MEANING["raw-adapter"]
    if kind in ("foreign-adapter", "raw-adapter"):
        report.base = {"name": read_json(path / plain.CONFIG).get("base_model_name_or_path")}
    return report


def _meaning(kind: str, record: Record | None) -> tuple[str, str]:
    """What a folder of that kind is and whether it is safe to serve."""
    if record is None or not record.beside or kind not in ON_RESIDUAL:
        what, safe = MEANING[kind]
        lost = record.notes.get("error") if record and kind == "lora" else None
        cut = (
            f", the best of rank {record.notes['rank']}: {lost:.1%} of the change is lost"
            if record and lost
            else ""
        )
        return what + cut, safe
    residual = record.notes.get("residual", "its residual")
    what, safe = (text.format(quant=record.beside, residual=residual) for text in ON_RESIDUAL[kind])
    return what, safe


def _check_base(record: Record, kind: str, base: Path, what: str) -> None:
    """Whether a folder belongs to a model: to the original, or to the residual where that is what it needs."""
    served_on = record.served_on
    if served_on and record.beside and kind in ("run", "state", "lora"):
        if is_residual(Checkpoint.open(base).config):
            return check_folder(replace(record, base=served_on), base, what)
        if kind == "lora":
            raise WrongBaseError(
                f"{what} was made for the residual {served_on.name}, not for the original {base}"
            )
    return check_folder(record, base, what)


def _errors(
    path: Path,
    kind: str,
    record: Record | None,
    base: str | Path | None,
    text: str | Path | None,
    workers: int | None,
    progress: Progress | None,
) -> list[Json]:
    if kind != "decomposed" or record is None or record.recipe is None or not record.recipe.quant:
        raise InputError(
            f"{path} is {MEANING[kind][0]}, and errors are those of a quantised residual: give what "
            "`pissa decompose MODEL OUT --quant nf4` wrote"
        )
    original = Path(base or record.made_of(str(path)).name)
    if not original.is_dir():
        raise InputError(f"the original model {original} is no folder here: name it with --base")
    check_workers(workers)
    check_folder(record, original, str(path))
    return quantisation_errors(
        path,
        record.recipe,
        original,
        text=Path(text) if text else None,
        workers=workers,
        progress=progress,
    )


def _record_of(path: Path, kind: str) -> Record | None:
    places = {"run": path / "state" / RECORD, "state": path / RECORD}
    file = places.get(kind, path / plain.RECORD)
    return Record.from_json(read_json(file), str(file)) if file.is_file() else None


def _change_layers(changes: dict[Target, Lora]) -> list[Json]:
    rows = []
    for target, change in changes.items():
        values = product_singular_values(change.B, change.A)
        rows.append(_row(target.weight, target.matrix_shape, values.tolist()))
    return rows


def _shares(changes: dict[Target, Lora], base: Path) -> list[float]:
    checkpoint = Checkpoint.open(base)
    skeleton = build_skeleton(checkpoint.folder)
    stored = stored_targets(list(changes), parameter_names(skeleton, checkpoint.tensors), base)
    return [
        principal_share(target.to_matrix(checkpoint.read(name)), changes[target])
        for name, target in stored.items()
    ]


def _pair_layers(folder: Path) -> list[Json]:
    config = read_json(folder / plain.CONFIG)
    scale = adapter_scale(config, folder)
    pairs = adapter_targets(config, Checkpoint.open(folder, need_config=False))
    return [
        _row(
            target.weight, target.matrix_shape, product_singular_values(left, right, scale).tolist()
        )
        for target, (left, right) in pairs.items()
    ]


def _row(name: str, shape: tuple[int, int], values: list[float]) -> Json:
    return {
        "name": name,
        "shape": list(shape),
        "rank": len(values),
        "energy": None,
        "error": None,
        "singular_values": values,
    }
