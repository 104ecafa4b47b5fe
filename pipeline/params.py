"""Typed params: one frozen dataclass for each section of `params.yaml`, without defaults, checked when it is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError, summarize

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def params_section(cls: type[T]) -> type[T]:
    """Make a class a section of the params: frozen, keyword-only, strictly typed, no unknown keys.

    The docstring under a field documents it: what it sets, its unit, what turns it off.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    return cast(type[T], pydantic_dataclass(cls, frozen=True, kw_only=True, config=config))


def load(path: Path, name: str, form: type[T]) -> T:
    """Read the section `name` of a params file into its dataclass `form`.

    Raises:
        UserError: The file is missing or not YAML, or a key is unknown, missing or of the wrong type.
    """
    document = read_yaml(path)
    if name not in document:
        raise UserError(f"{path}: section {name} is missing. Add it, or restore it from git.")
    return check(document[name], name, form, str(path))


def load_key(path: Path, key: str, form: Any) -> Any:
    """Read one value of a params file by its dotted key, without loading the code that owns its section.

    Raises:
        UserError: The file is missing or not YAML, or the value is missing or not of type `form`.
    """
    value: Any = read_yaml(path)
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"{path}: {key} is missing. Add it, or restore it from git.")
        value = value[name]
    return check(value, key, form, str(path))


def require_unchanged(path: Path, name: str, values: Any) -> None:
    """Check, at the end of a stage, that a section still holds the `values` read at its beginning.

    DVC records the params that it finds at the end of a stage.

    Raises:
        UserError: The section was changed meanwhile.
    """
    if load(path, name, type(values)) != values:
        raise UserError(
            f"{path}: section {name} was changed while the stage ran, so DVC would record the wrong values. Run again."
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 file that holds a mapping; `1e-4` is a number, as for DVC.

    Raises:
        UserError: The file is missing, not YAML, or not a mapping.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Name an existing params file.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {document!r}")
    return document


def check(values: Any, name: str, form: type[T], source: str) -> T:
    """Convert plain values to a section dataclass, or to another type, `form`.

    Args:
        values: What the file holds.
        name: Key of the values, which errors start from.
        form: Dataclass of the section, or type of the value.
        source: The file that errors name.

    Raises:
        UserError: Names every invalid key.
    """
    try:
        return TypeAdapter(form).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        faults = [_describe_fault(name, fault) for fault in error.errors()]
        raise UserError(f"{source}: {summarize(faults, limit=10)}") from None


def to_plain(values: Any) -> Any:
    """Convert a section back to plain values, as in the file."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")


def _describe_fault(name: str, fault: Mapping[str, Any]) -> str:
    key = ".".join([name, *(str(part) for part in fault["loc"])])
    match fault["type"]:
        case "missing":
            return f"{key} is missing"
        case "unexpected_keyword_argument":
            return f"{key} is not a known key"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case _:
            expected = str(fault["msg"]).replace("Input should be", "must be")
            return f"{key} {expected}, got {json.dumps(fault['input'])}"
