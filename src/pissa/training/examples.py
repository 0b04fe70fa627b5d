"""What a trainer is fed: tokenised rows, and the facts about them that a record keeps."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Examples:
    """Tokenised rows.

    Attributes:
        train: columns by name, one dict per row.
        evaluation: the same, empty for none.
        notes: counts and limits for the record.
        names: the classes' names in order of their index; empty for language.
        old: as evaluation, of what the model knew before; empty for none.
    """

    train: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]
    notes: dict[str, Any]
    names: list[str] = field(default_factory=list)
    old: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For run.json; a resumed run must find the same."""
        digest = hashlib.sha256()
        for row in (*self.train, {}, *self.evaluation, *([{}, *self.old] if self.old else ())):
            digest.update(json.dumps(row, sort_keys=True).encode())
        counts = {"train_rows": len(self.train), "eval_rows": len(self.evaluation)}
        return {**counts, **self.notes, "tokens_sha256": digest.hexdigest()}
