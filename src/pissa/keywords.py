"""The settings of a command as one object, for a function that users give keyword arguments.

A settings class is a frozen dataclass whose documented fields say all there is to say: type,
default and meaning. The command line makes a flag of each (`pissa.cli.options.flags`),
`spelled_out` a keyword argument with its line in the docstring, and everything below hands the
object on.
"""

from __future__ import annotations

import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from typing_extensions import Doc

Keywords = ParamSpec("Keywords")
Object = TypeVar("Object", covariant=True)
Result = TypeVar("Result")
Place = str | Path
NO_FLAG = object()
"""Beside the documentation of a field that a command line cannot give."""


class _Spell(Protocol[Keywords, Object]):
    """Of a function of two or three places and a settings object, one that takes keywords."""

    @overload
    def __call__(
        self, function: Callable[[Place, Place, Object], Result]
    ) -> Callable[Concatenate[Place, Place, Keywords], Result]: ...

    @overload
    def __call__(
        self, function: Callable[[Place, Place, Place, Object], Result]
    ) -> Callable[Concatenate[Place, Place, Place, Keywords], Result]: ...


def spelled_out(settings: Callable[Keywords, Object]) -> _Spell[Keywords, Object]:
    """Let users of a function give the settings in its last argument as keyword arguments.

    Args:
        settings: the dataclass of that argument.

    Returns:
        A decorator. What it makes has the fields in its signature and docstring; who has the object
        gives ``**vars(settings)``.
    """
    kinds = typing.get_type_hints(settings)
    fields = [
        field.replace(annotation=kinds.get(name, field.annotation))
        for name, field in inspect.signature(settings).parameters.items()
    ]

    def spell(function: Any) -> Any:  # typed by _Spell
        own = inspect.signature(function)
        *places, _ = own.parameters.values()
        signature = own.replace(parameters=[*places, *fields])

        def spelled(*args: Any, **keywords: Any) -> Any:  # as the signature says
            try:
                given = signature.bind(*args, **keywords).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            first = [given.pop(place.name) for place in places]
            made: Any = settings
            return function(*first, made(**given))

        for name in ("__module__", "__name__", "__qualname__"):
            setattr(spelled, name, getattr(function, name))
        spelled.__doc__ = _with_arguments(function.__doc__ or "", settings)
        spelled.__signature__ = signature  # type: ignore[attr-defined]
        return spelled

    return spell


def documented(settings: Any, *, flags: bool = False) -> dict[str, tuple[Any, str]]:
    """Type and meaning of each documented field of a settings class, its own before inherited ones.

    Args:
        settings: the class.
        flags: leave out what bears `NO_FLAG`.
    """
    hints = typing.get_type_hints(settings, include_extras=True)
    order = [name for kind in settings.__mro__ for name in inspect.get_annotations(kind)]
    found = {}
    for name in dict.fromkeys(order):
        if typing.get_origin(hints.get(name)) is Annotated:
            kind, *notes = typing.get_args(hints[name])
            if flags and NO_FLAG in notes:
                continue
            found[name] = kind, next(one.documentation for one in notes if isinstance(one, Doc))
    return found


def _with_arguments(text: str, settings: Any) -> str:
    """A docstring with a line for each documented field in the place of that for `settings`."""
    lines = [
        textwrap.fill(
            f"{name}: {meaning[:1].lower()}{meaning[1:]}",
            98,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
        )
        for name, (_, meaning) in documented(settings).items()
    ]
    return re.sub(r"^ +settings: .*$", lambda _: "\n".join(lines), text, flags=re.MULTILINE)
