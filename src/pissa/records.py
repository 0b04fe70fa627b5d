"""What was done to which base, as `pissa.json` beside every output.

Frozen dataclasses to and from JSON; a reader meets a known shape or an error, never a guess.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

from pissa.errors import CheckpointError
from pissa.untyped import Json

FORMAT = 1
KINDS = ("residual", "init", "state", "lora", "merged", "run", "w4a4")


@dataclass(frozen=True)
class Recipe:
    """How the weights were split."""

    method: str
    rank: int
    alpha: float
    svd: str | float
    seed: int
    base_form: str = "keep"
    targets: dict[str, str] = field(default_factory=dict)
    """Module path to kind (linear, conv1d, embedding, conv2d)."""
    quant: str | None = None
    """The quantiser of the frozen part."""
    double_quant: bool = False
    iterations: int = 1
    """Rounds of alternation between the low-rank part and the quantised rest."""
    options: Json = field(default_factory=dict)
    """The method's own settings."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Module path to rank, where layers have ranks of their own; else empty."""

    def rank_of(self, module: str) -> int:
        """The rank of one target."""
        return self.ranks.get(module, self.rank)

    @property
    def scale(self) -> float:
        """The factor of the adapter's product, alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Base:
    """The model that was split."""

    name: str
    revision: str | None = None
    fingerprint: str = ""
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    """Canonical tensor name to digests by dtype."""


@dataclass(frozen=True)
class Layer:
    """What the split of one weight kept and lost."""

    name: str
    shape: list[int]
    rank: int
    energy: float
    """Share of the squared Frobenius norm that lies in the trainable part."""
    error: float
    """Rebuilt from what was stored, relative to the weight (Frobenius)."""
    singular_values: list[float] = field(default_factory=list)
    """Of the trainable part, descending."""


@dataclass(frozen=True)
class Record:
    """The content of a `pissa.json`."""

    kind: str
    recipe: Recipe | None = None
    base: Base | None = None
    layers: list[Layer] = field(default_factory=list)
    residual: dict[str, dict[str, str]] = field(default_factory=dict)
    """Digests of the residual's own target tensors, where a residual was written."""
    notes: Json = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def beside(self) -> str | None:
        """The quantizer of the residual beside which alone this is right; None where it is right on
        the base.

        Quantization moves the weights off the base, so what was trained beside them means nothing
        elsewhere.
        """
        return self.recipe.quant if self.recipe else None

    @property
    def served_on(self) -> Base | None:
        """The model that a plain adapter made from this is right on: the base, or the residual beside which it is."""
        if self.base is None or self.beside is None:
            return self.base
        return Base(
            str(self.notes.get("residual", "")), None, "", {**self.base.tensors, **self.residual}
        )

    def made_of(self, what: str) -> Base:
        """The base, which all but adapters of unknown origin have.

        Args:
            what: has this record, for the message.

        Raises:
            CheckpointError: none is on record.
        """
        if self.base is None:
            raise CheckpointError(
                f"{what} says nothing of its base in pissa.json: make the folder again"
            )
        return self.base

    def split_by(self, where: str | Path) -> Recipe:
        """The recipe, which all that was split here has.

        Args:
            where: the folder of this record, for the message.

        Raises:
            CheckpointError: none is on record.
        """
        if self.recipe is None:
            raise CheckpointError(
                f"{where} says nothing of how it was split in pissa.json: make the folder again"
            )
        return self.recipe

    def to_json(self) -> Json:
        """A JSON object; `from_json` reads it back."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Json, where: str) -> Record:
        """Check and rebuild.

        Raises:
            CheckpointError: unknown format or kind, missing or mistyped keys; names the file.
        """
        if data.get("format") != FORMAT or data.get("kind") not in KINDS:
            raise CheckpointError(
                f"{where}: got format {data.get('format')!r} and kind {data.get('kind')!r}, expected format {FORMAT} "
                f"and one of {', '.join(KINDS)}: update pissa, or make the folder again"
            )
        try:
            return cls(
                kind=data["kind"],
                recipe=Recipe(**data["recipe"]) if data["recipe"] else None,
                base=Base(**data["base"]) if data["base"] else None,
                layers=[Layer(**layer) for layer in data["layers"]],
                residual=data["residual"],
                notes=data["notes"],
                versions=data["versions"],
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{where} is damaged ({error}): make the folder again") from error


def versions(*more: str) -> dict[str, str]:
    """The versions that decide what was computed, those of `more` packages too."""
    packages = ("pissa", "torch", "transformers", "peft", "safetensors", "bitsandbytes", *more)
    return {
        name: importlib.metadata.version(name)
        for name in packages
        if importlib.util.find_spec(name)
    }
