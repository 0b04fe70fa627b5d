"""A 4-bit model from disk, without ever holding the weights in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from pissa.checkpoint.output import read_json
from pissa.checkpoint.reader import Checkpoint
from pissa.checkpoint.skeleton import build_skeleton
from pissa.checkpoint.targets import find_targets
from pissa.errors import CheckpointError
from pissa.linalg.int4 import GROUP
from pissa.untyped import Json
from pissa.w4a4.linear import W4A4Linear
from pissa.w4a4.model import refuse_saving
from pissa.w4a4.writing import KIND, WEIGHTS


def load_w4a4(
    folder: str | Path, *, device: str = "cpu", trust_remote_code: bool = False
) -> nn.Module:
    """The transformers model of a folder that `svdquant` wrote, its 4-bit layers in place, in
    evaluation mode.

    Args:
        folder: as written; every other kind is refused.
        device: where to put it.
        trust_remote_code: whether the model's own code may run.

    Raises:
        CheckpointError: not such a folder, or one that lacks a tensor.
    """
    folder = Path(folder)
    note = w4a4_note(folder)
    skeleton: Any = build_skeleton(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):  # buffers that no file holds are computed
        model = type(skeleton)(skeleton.config)
    for target in find_targets(skeleton, note["modules"]):
        rows, columns = target.matrix_shape
        bias = model.get_submodule(target.module).bias
        model.set_submodule(
            target.module, W4A4Linear(columns, rows, note["rank"], bias, device="meta")
        )
    stored = Checkpoint.open(folder / WEIGHTS, need_config=False)
    model.load_state_dict(
        {name: stored.read(name) for name in stored.tensors}, strict=False, assign=True
    )
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    absent = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if absent:
        raise CheckpointError(
            f"{folder / WEIGHTS} lacks `{absent[0]}` of {len(absent)}: write the folder again"
        )
    return refuse_saving(model.to(device).eval())


def w4a4_note(folder: Path) -> Json:
    """What config.json says of a 4-bit folder: rank, group, modules.

    Raises:
        CheckpointError: another kind of folder, or codes in other groups than are computed with
            here.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    note = config.get("pissa")
    if not isinstance(note, dict) or note.get("kind") != KIND:
        raise CheckpointError(
            f"{folder} is no 4-bit model of svdquant: its config.json does not say so"
        )
    if note.get("group") != GROUP:
        raise CheckpointError(
            f"{folder} has groups of {note.get('group')!r}, expected {GROUP}: update pissa"
        )
    return note


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
