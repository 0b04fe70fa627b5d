"""`pissa merge BASE RUN OUT`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument

from pissa.cli import options, show


def merge(
    base: Annotated[str, Argument(help="The original model: a folder or a Hub id.")],
    run: Annotated[Path, Argument(help="A run or a plain LoRA adapter.")],
    out: Annotated[Path, Argument(help="The folder to write.")],
    dtype: options.Dtype = None,
    max_shard_bytes: options.MaxShardBytes = "5GB",
    revision: options.Revision = None,
    trust_remote_code: options.RemoteCode = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write base plus change as an ordinary model.

    One tensor is in memory at a time, so any size of model fits.
    """
    import pissa

    with show.bytes_progress("merging") as progress:
        record = pissa.merge(
            base,
            run,
            out,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            revision=revision,
            trust_remote_code=trust_remote_code,
            force=force,
            progress=progress,
        )
    if as_json:
        show.print_json(record.to_json())
        return
    show.say(f"{out}: {base} with {run} merged in")
    show.say_next(f"pissa inspect {out}", f"vllm serve {out}")
