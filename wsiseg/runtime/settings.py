"""Settings as dataclasses: ranges at the field, nested mappings from files, and one sentence about what is wrong."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar

from wsiseg.errors import ConfigError
from wsiseg.runtime.paths import require_text
from wsiseg.runtime.text import did_you_mean

if typing.TYPE_CHECKING:
    from collections.abc import Iterator

Value = TypeVar("Value")
Group = Literal["source", "method", "execution"]

_LARGEST = 1e300  #: a whole number may be too large for a float


def setting(default: Value, low: float | None = None, high: float | None = None, *, group: Group = "method") -> Value:
    """Declare a field of a dataclass of settings.

    Parameters
    ----------
    default
        Value when none is given.
    low, high
        Allowed range of a number, both ends included.
    group
        ``source``: points to a file, or says what it is; ``method``: decides the result; ``execution``: decides nothing but cost and formats.
    """
    metadata: dict[str, object] = {"group": group}
    if low is not None and high is not None:
        metadata["range"] = (low, high)
    field: Value = dataclasses.field(default=default, metadata=metadata)
    return field


def in_group(section: Any, group: Group) -> dict[str, Any]:  # noqa: ANN401
    """Values of the fields of one group, sections as mappings."""
    names = {f.name for f in dataclasses.fields(section) if f.metadata.get("group", "method") == group}
    return {name: value for name, value in dataclasses.asdict(section).items() if name in names}


def flatten(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, dataclasses.Field[Any]]]:  # noqa: ANN401
    """Every setting: dotted name, value, annotated type, field."""
    hints = typing.get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(hints[item.name]) and type(value) is hints[item.name]:
            yield from flatten(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, hints[item.name], item


def short_repr(section: Any) -> str:  # noqa: ANN401
    """The call that makes a section of settings, with those that are not at their default."""
    changed = []
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if value != default:
            changed.append(f"{item.name}={short_repr(value) if dataclasses.is_dataclass(value) else repr(value)}")
    return f"{type(section).__name__}({', '.join(changed)})"


def check_types(section: Any, where: str) -> None:  # noqa: ANN401
    """Refuse the first value that is not of its field's type or among its literals.

    Raises
    ------
    ConfigError
        With what is allowed.
    """
    for name, value, hint, _ in flatten(section):
        cast(value, hint, where, name)


def check_values(section: Any, where: str) -> None:  # noqa: ANN401
    """Refuse the first number outside its range, or empty text; types are right already.

    Raises
    ------
    ConfigError
        With what is allowed.
    """
    for name, value, _, item in flatten(section):
        if isinstance(value, int | float) and not isinstance(value, bool):
            low, high = item.metadata["range"]
            if not low <= value <= high:  # false for NaN as well
                raise ConfigError(f"{where}: {name} is {shown(value)}; it must lie between {low:g} and {high:g}")
        for text in (value,) if isinstance(value, str) else value if isinstance(value, tuple) else ():
            if not text.strip():
                raise ConfigError(f"{where}: {name} is empty; give a value, or leave it out")
            require_text(text, ConfigError)


def merge(current: Any, mapping: Any, where: str, prefix: str = "") -> Any:  # noqa: ANN401
    """Replace settings by the values of a nested mapping.

    Parameters
    ----------
    current
        A dataclass of settings.
    mapping
        Keys are the names of its fields; sections are mappings.
    where, prefix
        What to call the mapping in errors, and the dotted name of the section.

    Raises
    ------
    ConfigError
        A key is unknown, or a value has another type.
    """
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{where}: {prefix.rstrip('.') or 'the top level'} must be a table of keys, found {type(mapping).__name__}"
        )
    known = sorted(f.name for f in dataclasses.fields(current))
    hints = typing.get_type_hints(type(current))
    changes: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in known:
            shown = prefix + (key if key.isprintable() and len(key) < 100 else reprlib.repr(key))
            raise ConfigError(
                f"{where}: unknown key {shown}; {did_you_mean(key, known)}allowed here: {', '.join(known)}"
            )
        if dataclasses.is_dataclass(getattr(current, key)):
            changes[key] = merge(getattr(current, key), value, where, f"{prefix}{key}.")
        else:
            changes[key] = cast(value, hints[key], where, prefix + key)
    return dataclasses.replace(current, **changes)


def cast(value: Any, hint: Any, where: str, name: str) -> Any:  # noqa: ANN401
    """``value`` as the annotated type of its field, or a sentence."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else cast(value, next(a for a in arguments if a is not type(None)), where, name)
    if origin is tuple and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return tuple(cast(v, str, where, name) for v in value)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            allowed = ", ".join(map(str, arguments))
            raise ConfigError(
                f"{where}: {name} is {shown(value)}; {did_you_mean(value, arguments)}choose from {allowed}"
            )
        return value
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return math.copysign(math.inf, value > 0 or -1) if abs(value) > _LARGEST else float(value)
    if not (isinstance(value, str) if hint is str else type(value) is hint):
        raise ConfigError(
            f"{where}: {name} is {shown(value)}; it must be of type {getattr(hint, '__name__', str(hint))}"
        )
    if hint is str and "\0" in value:
        raise ConfigError(f"{where}: {name} is {shown(value)}; a NUL character is not allowed in it; leave it out")
    return value


def shown(value: object) -> str:
    """A value in a message: short, in one line, whatever it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "too large" if abs(value) > _LARGEST else f"{value:g}"
    return reprlib.repr(value)[:100]
