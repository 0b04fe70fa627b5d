"""One tensor on its way through a decomposition, and the line that stands for it once it is written."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pissa.checkpoint.fingerprint import Digests
from pissa.records import Layer


@dataclass(frozen=True)
class Piece:
    """One tensor of the base on its way into the output.

    Attributes:
        name: in the base.
        base: digests of it under its canonical name; empty for a tensor that is no parameter.
        residual: digests of what takes a target's place, under canonical names.
        layer: what the split of a target kept and lost.
        tensors: what is written of it, in the residual and in the start.
    """

    name: str
    base: dict[str, Digests] = field(default_factory=dict)
    residual: dict[str, Digests] = field(default_factory=dict)
    layer: Layer | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def receipt(self, late: set[str]) -> str:
        """A line that stands for the piece once its tensors are written; `late` ones, which are JSON, are in it."""
        texts = {name: bytes(tensor.tolist()).decode() for name, tensor in self.tensors.items() if name in late}
        facts = dataclasses.asdict(dataclasses.replace(self, tensors={}))
        return json.dumps({**facts, "tensors": texts}) + "\n"

    @classmethod
    def from_receipt(cls, line: str) -> Piece:
        """The piece that a line stands for, with its late tensors."""
        facts = json.loads(line)
        tensors = {
            name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            for name, text in facts.pop("tensors").items()
        }
        layer = facts.pop("layer")
        return cls(**facts, layer=Layer(**layer) if layer else None, tensors=tensors)


def finished(path: Path) -> list[Piece]:
    """The pieces that a killed run finished; a last line that the kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return [Piece.from_receipt(line) for line in whole]
