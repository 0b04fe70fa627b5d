"""What was seen of a model's layers, in memory or in one file that is read a layer at a time."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pissa.checkpoint.fingerprint import Digests, check_tensor, tensor_digest
from pissa.checkpoint.layout import Spec, read_header
from pissa.checkpoint.writer import TensorFile
from pissa.errors import CheckpointError, InputError, OutputError
from pissa.linalg import Components

GRADIENT = "gradient"
KEY, FORMAT = "pissa.observations", 1
PARTS = ("mean", "values", "vectors")
"""The tensors of `Components`."""


@dataclass(frozen=True, eq=False)
class Observations:
    """What methods need to have seen of a model's layers; see `pissa.observe.observe`.

    Names are the weights' canonical ones, see `pissa.checkpoint.fingerprint`.

    Attributes:
        seen: by need, then by weight: a tensor or `Components`. Inputs that layers share are there
            once.
        same: by weight, the one under which its input is found.
        base: digests of the weights that were observed.
        facts: what was read and how, in JSON's types; the caller adds what it knows of the data.
    """

    seen: Mapping[str, Mapping[str, Any]]
    same: Mapping[str, str]
    base: Mapping[str, Digests]
    facts: dict[str, Any]

    def get(self, need: str, name: str) -> Any:
        """What was seen of one weight.

        Args:
            need: covariance, components, gradient or inputs.
            name: of the weight.

        Raises:
            InputError: the need or the layer was not observed.
        """
        if need not in self.seen:
            raise InputError(
                f"`{name}` was observed for {', '.join(self.seen)}, not for {need}: observe that too"
            )
        of_layers = self.seen[need]
        found = name if need == GRADIENT else self.same.get(name, name)
        if found not in of_layers:
            why = (
                "the rows that were read did not reach this layer"
                if name in self.base
                else "it was not a target"
            )
            raise InputError(
                f"there is no {need} of `{name}` ({why}): observe it, or leave it out of targets"
            )
        return of_layers[found]

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare weights at hand with those that were observed, among them all or one.

        Args:
            tensors: stored weights by canonical name; those that were not observed are passed over.

        Raises:
            WrongBaseError: naming the first that differs.
        """
        for name, tensor in tensors.items():
            if name in self.base:
                advice = "Observe the model at hand, or take the one that was observed"
                check_tensor(name, self.base[name], tensor, what="the observation", advice=advice)

    def digest(self) -> str:
        """SHA-256 of all that was seen, a layer at a time."""
        total = hashlib.sha256(json.dumps([self.facts, dict(self.same)], sort_keys=True).encode())
        for key, value in self._entries():
            for name, part in _tensors(key, value).items():
                total.update(f"{name} {tensor_digest(part)}".encode())
        return total.hexdigest()

    def save(self, file: str | Path, *, force: bool = False) -> None:
        """Write one safetensors file, a tensor at a time; it appears whole or not at all.

        Args:
            file: to make.
            force: replace what is there.

        Raises:
            OutputError: it is there, or cannot be written.
        """
        path = Path(file).expanduser()
        if path.exists() and not force:
            raise OutputError(
                f"{path} is there: use force=True to replace it, or choose another file"
            )
        plan: dict[str, Spec] = {}
        counts: dict[str, list[float]] = {}
        for key, value in self._entries():
            plan |= {
                name: (part.dtype, tuple(part.shape)) for name, part in _tensors(key, value).items()
            }
            if isinstance(value, Components):
                counts[key] = [value.rows, value.energy]
        told = {
            "format": FORMAT,
            "seen": {need: list(names) for need, names in self.seen.items()},
            "counts": counts,
        }
        told |= {"same": dict(self.same), "base": dict(self.base), "facts": self.facts}
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with TensorFile(partial, plan, {KEY: json.dumps(told)}) as out:
                for key, value in self._entries():
                    for name, part in _tensors(key, value).items():
                        out.write(name, part)
            os.replace(partial, path)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error}): choose another place"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _entries(self) -> Iterator[tuple[str, Any]]:
        for need, of_layers in self.seen.items():
            for name in of_layers:
                yield f"{need}/{name}", of_layers[name]

    @classmethod
    def load(cls, file: str | Path) -> Observations:
        """What `save` wrote; a layer is read from the file when it is asked for.

        Raises:
            CheckpointError: the file is damaged, or holds something else.
        """
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"{path} is not there: write it with pissa observe")
        read_header(path)
        with safe_open(path, "pt") as tensors:
            text = (tensors.metadata() or {}).get(KEY)
        try:
            told = json.loads(text or "{}")
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']!r}, expected {FORMAT}")
            seen = {
                need: _Stored(path, need, names, told["counts"])
                for need, names in told["seen"].items()
            }
            return cls(seen, told["same"], told["base"], told["facts"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} holds no observations that this version reads ({error}): make it by Observations.save"
            ) from error


class _Stored(Mapping[str, Any]):
    """One need by weight, in a file."""

    def __init__(self, path: Path, need: str, names: list[str], counts: dict[str, Any]) -> None:
        self._path, self._need, self._names, self._counts = path, need, dict.fromkeys(names), counts

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        key = f"{self._need}/{name}"
        with safe_open(self._path, "pt") as tensors:
            if key not in self._counts:
                return tensors.get_tensor(key)
            return Components(
                *(tensors.get_tensor(f"{key}/{part}") for part in PARTS), *self._counts[key]
            )

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tensors(key: str, value: Any) -> dict[str, Tensor]:
    """What a file holds of one value, by name."""
    return (
        {f"{key}/{part}": getattr(value, part) for part in PARTS}
        if isinstance(value, Components)
        else {key: value}
    )
