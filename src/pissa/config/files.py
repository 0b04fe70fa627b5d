"""YAML files of settings: read safely, each over the file that it `extends`, found by path or by a recipe's name."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pissa.errors import ConfigError, did_you_mean

RECIPES = Path(__file__).parents[1] / "recipes"
"""The folder of the YAML files that come along."""
EXTENDS = "extends"


@dataclass(frozen=True)
class ConfigFile:
    """One file of a chain.

    Attributes:
        path: where it is.
        values: its keys without `extends`, as they are spelled there.
        mistakes: keys that stand there twice.
    """

    path: Path
    values: dict[str, Any]
    mistakes: list[str] = field(default_factory=list)


def read_chain(path: Path) -> list[ConfigFile]:
    """The file and all that it extends, the base first.

    Args:
        path: a YAML file, or the bare name of a recipe where there is no such file.

    Raises:
        ConfigError: a file that is absent, no YAML mapping, outside its reader's folder, or part of
            a circle.
    """
    chain: list[ConfigFile] = []
    seen: list[Path] = []
    following: Path | None = _find(path)
    while following:
        path, following = following, None
        circle = path.resolve() in seen
        seen.append(path.resolve())
        if circle:
            names = " extends ".join(file.name for file in seen)
            raise ConfigError(
                f"{names}: got a circle, expected a file at its end that extends nothing"
            )
        file = _read(path)
        if EXTENDS in file.values:
            following = _base_of(path, file.values.pop(EXTENDS))
        chain.insert(0, file)
    return chain


def _find(path: Path) -> Path:
    """The path itself if it is a file, else a recipe's file for its bare name."""
    return path if path.is_file() else _recipe(str(path)) or path


def _recipe(name: str) -> Path | None:
    path = RECIPES / f"{name}.yaml"
    return path if Path(name).name == name and path.is_file() else None


def _base_of(path: Path, name: Any) -> Path:
    """The file that `extends: name` in the file `path` means; never one outside that file's folder."""
    where, folder = f"{path}: extends: got {name!r}", path.parent
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}, expected the path of a YAML file or a recipe's name")
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{where}, expected a file in {folder} or below it, or a recipe's name")
    found = folder / name if (folder / name).is_file() else _recipe(name)
    if found is None:
        raise ConfigError(
            f"{where}, which is neither a file in {folder} nor a recipe.{_nearest(name)}"
        )
    return found


def _read(path: Path) -> ConfigFile:
    if path.is_dir():
        inside = path / "settings.yaml"
        hint = f": did you mean {inside}?" if inside.is_file() else ""
        raise ConfigError(f"{path} is a folder, expected a YAML file or a recipe's name{hint}")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): give the path of a YAML file, or a name listed by "
            f"`pissa recipes`.{_nearest(path.name)}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: got {type(content).__name__}, expected lines like `model: folder`"
        )
    return ConfigFile(path, {str(key): value for key, value in content.items()}, loader.repeated)


def _nearest(name: str) -> str:
    return did_you_mean(name, (file.stem for file in sorted(RECIPES.glob("*.yaml"))))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that notes repeated keys, which it would let win silently."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [
            (self.construct_object(key, deep=True), key.start_mark.line + 1)
            for key, _ in node.value
        ]
        first: dict[Any, int] = {}
        for key, line in keys:
            if not isinstance(key, Hashable):
                continue  # as in {{ placeholder }}: YAML's own error names the line
            if key in first:
                self.repeated.append(
                    f"{key}: got it in line {first[key]} and again in line {line}, expected it once"
                )
            first.setdefault(key, line)
        return super().construct_mapping(node, deep)
