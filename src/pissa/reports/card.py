"""The model card of a run's adapter: README.md with the front matter that the Hub reads. Only what records say."""

from __future__ import annotations

import re
from pathlib import Path

from pissa.adapters import plain
from pissa.checkpoint.output import read_json
from pissa.records import Record
from pissa.reports.page import render, write_page
from pissa.reports.run_record import read_run, set_by_hand
from pissa.untyped import Json

NAME = "README.md"
PRIVATE = {
    "model",
    "data",
    "eval_data",
    "old_data",
    "output",
    "force",
    "device",
    "report_to",
    "trust_remote_code",
}
"""Settings that a card leaves out: told elsewhere in it, or of one machine only."""
RESULTS = (
    "loss", "eval_loss", "old_loss", "eval_accuracy", "eval_f1", "eval_matthews", "eval_pearson", "eval_spearman"
)  # fmt: skip


def write_card(run: str | Path, folder: str | Path | None = None) -> Path:
    """Write the card of a finished run beside weights, as README.md.

    Files on this machine are named without their folders, so that the card can be published.

    Args:
        run: the folder that `pissa train` wrote.
        folder: where the weights are. Default: adapter/ in the run, or model/ for full.

    Returns:
        The file.

    Raises:
        CheckpointError: no run, or a damaged one.
    """
    run = Path(run)
    record = read_run(run)
    settings = record["settings"]
    folder = Path(folder or run / ("model" if settings["method"] == "full" else "adapter"))
    made, config = _adapter(folder)
    sources = [{**source, "name": _public(source["name"])} for source in record["data"]["sources"]]
    base = made.base.name if made and made.base else record["base"]["name"]
    beside = bool(made and made.beside)
    load = "RESIDUAL_FOLDER" if beside else base if _on_hub(base) else "FOLDER_OF_THE_BASE"
    regresses = settings.get("task") == "regression"
    outputs = 1 if regresses else len(record.get("labels") or [])
    text = render(
        "card.md",
        header=_header(settings, base, record["data"]["sources"]),
        name=run.resolve().name,
        settings=settings,
        chosen={key: value for key, value in set_by_hand(settings).items() if key not in PRIVATE},
        base=_public(base),
        load=load,
        tokenizer="THIS_FOLDER" if (folder / "tokenizer_config.json").is_file() else load,
        error=made.notes.get("error", 0) if made else 0,
        revision=made.base.revision if made and made.base else settings.get("revision"),
        fingerprint=made.base.fingerprint if made and made.base else None,
        recipe=made.recipe if made else None,
        adapter_rank=config.get("r"),
        heads=config.get("modules_to_save"),
        residual=beside,
        sources=sources,
        record=record,
        results={key: record[key] for key in RESULTS if record.get(key) is not None},
        labels=record.get("labels") or [],
        outputs=outputs,
        auto="AutoModelForSequenceClassification" if outputs else "AutoModelForCausalLM",
    )
    return write_page(folder / NAME, text.lstrip())


def _adapter(folder: Path) -> tuple[Record | None, Json]:
    """The record and the config of an adapter; nothing for a whole model."""
    file = folder / plain.RECORD
    if not file.is_file():
        return None, {}
    return Record.from_json(read_json(file), str(file)), read_json(folder / plain.CONFIG)


def _header(settings: Json, base: str, sources: list[Json]) -> str:
    """The YAML between the dashes; a base or data set is named only where the Hub knows the name."""
    from huggingface_hub import ModelCardData

    full = settings["method"] == "full"
    ids = [source["name"].partition(":")[0] for source in sources]
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        library_name="transformers" if full else "peft",
        pipeline_tag="text-generation"
        if settings.get("task", "language") == "language"
        else "text-classification",
        tags=None if full else sorted({"lora", settings["method"]}),
        datasets=sorted({name for name in ids if _on_hub(name)}) or None,
    )
    return data.to_yaml()


def _on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _public(name: str) -> str:
    """A name without the folders of this machine."""
    return name if _on_hub(name.partition(":")[0]) else Path(name).name
