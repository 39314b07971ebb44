"""JSON values for the fields of a dataclass, checked against the types that the fields declare."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class FieldError(ValueError):
    """A value that a field cannot hold; the message names the field, the value and what is wanted."""


def fitting(kind: type, values: Mapping[str, Any], but: Collection[str] = ()) -> dict[str, Any]:
    """The values that are for fields of a dataclass, as the fields hold them: whole numbers become floats.

    Nothing else is converted: no text becomes a number, no truth value an integer. NaN and infinities are
    no JSON. A field whose type cannot be checked, such as one that is imported for the type checker alone,
    takes what it is given.

    Args:
        kind: A dataclass.
        values: By name; those of other names are left out.
        but: Names of fields that are neither checked nor returned.

    Raises:
        FieldError: For the first value that does not fit, or the first field without default or value.
    """
    found: dict[str, Any] = {}
    adapters = _adapters(kind)
    for field in dataclasses.fields(kind):
        if field.name in but:
            continue
        if field.name in values:
            found[field.name] = _fit(field.name, values[field.name], adapters[field.name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FieldError(f"{field.name} is missing")
    return found


def _fit(name: str, value: Any, adapter: TypeAdapter[Any] | None) -> Any:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise FieldError(f"{name} = {_shown(value)}: give a finite number, a text or a truth value") from None
    if adapter is None:
        return value
    from pydantic import ValidationError

    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        wanted = dict.fromkeys(
            problem["msg"].removeprefix("Input should be ") for problem in error.errors(include_url=False)
        )
        raise FieldError(f"{name} = {_shown(value)}: give {' or '.join(wanted)}") from None


def _shown(value: Any) -> str:
    # as a user wrote it: nan rather than float('nan'), a date as in TOML
    text = json.dumps(value) if isinstance(value, str | bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.cache
def _adapters(kind: type) -> dict[str, TypeAdapter[Any] | None]:
    try:
        hints = get_type_hints(kind)
    except NameError:
        hints = {}
    return {field.name: _adapter(hints.get(field.name, Any)) for field in dataclasses.fields(kind)}


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return None
