"""The recipes: which there are, each as one readable file, and a copy of one to change."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pissa.checkpoint.output import write_text
from pissa.config import KEYS, TrainSettings
from pissa.config.files import EXTENDS, RECIPES, read_chain
from pissa.config.reading import merged_values
from pissa.errors import ConfigError, OutputError, did_you_mean

LINE = re.compile(r"^(?P<key>\w+):\s")


@dataclass(frozen=True)
class Recipe:
    """The settings of a known training.

    Attributes:
        name: what users type: TASK-METHOD, and -small for one that a processor runs in a minute or
            so.
        task: what the model learns.
        method: full, a method's name or a preset's.
        model: the base model; None where it is left to a flag.
        data: the training data; None where they are left to a flag.
        what: one line about it.
    """

    name: str
    task: str
    method: str
    model: str | None
    data: str | None
    what: str


def names() -> list[str]:
    """All recipes; files that only carry what others share are none."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml") if not file.stem.startswith("base"))


def recipes() -> list[Recipe]:
    """All recipes by name."""
    return [_recipe(name) for name in names()]


def text(name: str) -> str:
    """A recipe as one file: all that it extends resolved, comments kept, what is left to flags
    named.

    Raises:
        ConfigError: no recipe of that name.
    """
    chain = [file.path for file in read_chain(_file(name))]
    lines: dict[str, str] = {}
    for path in chain:
        for line in path.read_text(encoding="utf-8").splitlines():
            if (found := LINE.match(line)) and found["key"] != EXTENDS:
                lines[found["key"]] = line
    fields = TrainSettings.model_fields
    left = [key for key in KEYS if fields[key].is_required() and key not in lines]
    lines |= {key: f"# {key}:  # {fields[key].description}" for key in left}
    head = chain[-1].read_text(encoding="utf-8").splitlines()[0]
    body = [lines[key] for key in sorted(lines, key=KEYS.index)]
    return "\n".join([head, f"# The recipe {name} of pissa.", *body]) + "\n"


def copy(name: str, target: str | Path | None = None, force: bool = False) -> Path:
    """Write a recipe as one file of its own.

    Args:
        name: of the recipe.
        target: the file, or a folder that is there; None for NAME.yaml here.
        force: replace a file that is there.

    Returns:
        The file.

    Raises:
        ConfigError: no recipe of that name.
        OutputError: a file that is there already, or a folder that is not.
    """
    content = text(name)
    path = Path(target or f"{name}.yaml").expanduser()
    path = path / f"{name}.yaml" if path.is_dir() else path
    if path.exists() and not force:
        raise OutputError(f"{path} exists: give another name, or --force to replace it")
    try:
        write_text(path, content)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error}): give a file in a folder that is there"
        ) from error
    return path


def _file(name: str) -> Path:
    if name not in names():
        raise ConfigError(
            f"no recipe {name!r}.{did_you_mean(name, names())} `pissa recipes` lists them all"
        )
    return RECIPES / f"{name}.yaml"


def _recipe(name: str) -> Recipe:
    path = _file(name)
    values = merged_values(path)
    task = name.removesuffix("-small").removesuffix(f"-{values['method']}")
    what = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").rstrip(".")
    return Recipe(name, task, values["method"], values.get("model"), values.get("data"), what)
