"""What to type after a training, for the lines that `pissa train` ends with and for the run's page."""

from __future__ import annotations

import shlex
from pathlib import Path

from pissa.adapters import plain
from pissa.checkpoint.output import read_json
from pissa.presets import find
from pissa.untyped import Json

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank."""


def served_rank(rank: int) -> int:
    """The least value for vLLM's --max-lora-rank that holds an adapter of this rank."""
    return next((limit for limit in SERVED_RANKS if limit >= rank), SERVED_RANKS[-1])


def next_commands(run: Path, record: Json) -> list[tuple[str, str]]:
    """(What for, command) of a finished run; of an unfinished one how to go on.

    Args:
        run: its folder.
        record: the content of its run.json.
    """
    settings = record["settings"]
    here, talks = shlex.quote(str(run)), settings.get("task", "language") == "language"
    if record["status"] != "finished":
        force = " --force false" if settings.get("force") else ""
        return [("go on", f"pissa train {shlex.quote(str(run / 'settings.yaml'))} --resume{force}")]
    chat = [("try it", f"pissa chat {here}")] if talks else []
    if settings["method"] == "full":
        model = shlex.quote(str(run / "model"))
        serve = [("serve it", f"vllm serve {model}")] if talks else []
        return [*chat, ("look into it", f"pissa inspect {model}"), *serve]
    # Of a run on a residual this is the original model, of one on a residual in few bits that
    # residual.
    adapter = read_json(run / "adapter" / plain.CONFIG)
    base = str(adapter["base_model_name_or_path"])
    quantised = (Path(base) / plain.INIT).is_dir()
    full_rank = find(settings["method"]).full_rank
    convert = f"pissa convert {here} LORA" + (" --rank 16" if full_rank else "")
    serving = (
        f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {served_rank(adapter['r'])}"
    )
    return [
        *chat,
        ("look into it", f"pissa inspect {here}"),
        *([] if quantised else [("write a plain LoRA of its own", convert)]),
        ("merge it into one model", f"pissa merge {shlex.quote(base)} {here} MERGED"),
        *(
            [("serve it", f"{serving} --lora-modules mine={shlex.quote(str(run / 'adapter'))}")]
            if talks and not full_rank
            else []
        ),
    ]
