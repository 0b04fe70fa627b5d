"""A 4-bit model as an ordinary one: ``(Q(R) + L) diag(1 / smooth)`` in 16 or 32 bits, which every tool loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pissa.adapters import plain
from pissa.checkpoint.layout import Spec, plan_bytes
from pissa.checkpoint.output import read_json, staged_output, write_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton
from pissa.checkpoint.targets import Target, find_targets
from pissa.checkpoint.writer import CheckpointWriter, parse_bytes
from pissa.records import Record, versions
from pissa.surgery.decompose import STORED, check_dtype, output_dtype
from pissa.surgery.decomposition import Progress
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.loading import w4a4_note
from pissa.w4a4.writing import WEIGHTS


def export_dense(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int | str = "5GB",
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Record:
    """Write what the 4-bit weights stand for; activations are no longer quantised, which no weight can carry.

    Args:
        source: a folder that `svdquant` wrote.
        out: the folder to write, an ordinary Hugging Face model; it appears whole or not at all.
        dtype: "float32", "bfloat16" or "float16"; of the base by default.
        max_shard_bytes: size of an output file.
        trust_remote_code: whether the model's own code may run.
        force: replace `out`.
        progress: told after every tensor.

    Raises:
        CheckpointError: another kind of folder.
    """
    check_dtype(dtype)
    source, shard_bytes = Path(source), parse_bytes(max_shard_bytes)
    note = w4a4_note(source)
    own = str(read_json(source / "config.json").get("dtype", "float32"))
    skeleton = build_skeleton(source, trust_remote_code=trust_remote_code)
    targets = {target.module: target for target in find_targets(skeleton, note["modules"])}
    stored = Checkpoint.open(source / WEIGHTS, need_config=False)
    wanted = STORED[dtype or own]
    plan = dict(_plan(stored, targets, dtype, wanted))
    total, done = plan_bytes(plan), 0
    with staged_output(out, force=force, needs_bytes=total, inputs=[source]) as folder:
        with CheckpointWriter(folder, plan, shard_bytes) as writer:
            for name, spec in plan.items():
                module = name.removesuffix(".weight")
                target = targets.get(module)
                tensor = _dense(stored, target, note["rank"]) if target else stored.read(name)
                writer.write(name, tensor.to(spec[0]))
                done += plan_bytes({name: spec})
                if progress:
                    progress(name, done, total)
        record = _write_small_files(source, folder, wanted)
    return record


def _plan(
    stored: Checkpoint, targets: dict[str, Target], dtype: str | None, wanted: torch.dtype
) -> Iterator[tuple[str, Spec]]:
    """Name, dtype and shape of each tensor in the output; a target's parts give one."""
    parts = set(W4A4Linear(1, 1, 1, device="meta").state_dict())
    for name, info in stored.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in targets or part not in parts:
            yield name, (output_dtype(info.dtype, dtype), info.shape)
        elif part == "codes":
            yield f"{module}.weight", (wanted, targets[module].shape)


def _dense(stored: Checkpoint, target: Target, rank: int) -> Tensor:
    """The weight of one target in its stored shape, float32."""
    rows, columns = target.matrix_shape
    layer = W4A4Linear(columns, rows, rank)
    layer.load_state_dict({key: stored.read(f"{target.module}.{key}") for key in layer.state_dict()})
    return target.from_matrix(layer.dense())


def _write_small_files(source: Path, folder: Path, dtype: torch.dtype) -> Record:
    """Config without the note of 4 bits, tokenizer, and a record that names the same base."""
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    config = read_json(source / "config.json")
    config.pop("pissa")
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    facts = read_json(source / plain.RECORD) | {"kind": "merged", "notes": {}, "versions": versions()}
    record = Record.from_json(facts, str(source / plain.RECORD))
    write_json(folder / plain.RECORD, record.to_json())
    return record
