"""Typed params: one frozen dataclass without defaults for each section of `params.yaml`, validated when it is read."""

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


def load(path: Path, name: str, section_type: type[T]) -> T:
    """Read a section of a params file into its dataclass.

    Args:
        path: The params file.
        name: Name of the section.
        section_type: Dataclass of the section.

    Raises:
        UserError: The file is missing or not YAML, or a key is unknown, missing or of the wrong type.
    """
    document = read_yaml(path)
    if name not in document:
        raise UserError(f"{path}: section {name} is missing. Add it, or restore it from git.")
    return check(document[name], name, section_type, str(path))


def load_key(path: Path, key: str, expected_type: Any) -> Any:
    """Read one value of a params file, without importing the dataclass of its section.

    Args:
        path: The params file.
        key: Dotted key, such as `dataset.root`.
        expected_type: Type of the value.

    Raises:
        UserError: The file is missing or not YAML, or the value is missing or of another type.
    """
    value: Any = read_yaml(path)
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(f"{path}: {key} is missing. Add it, or restore it from git.")
        value = value[name]
    return check(value, key, expected_type, str(path))


def require_unchanged(path: Path, name: str, values: Any) -> None:
    """Check, at the end of a stage, that a section still has the values read at its start.

    DVC records the params as they are at the end of a stage.

    Args:
        path: The params file.
        name: Name of the section.
        values: The section as read at the start.

    Raises:
        UserError: The section was changed while the stage ran.
    """
    if load(path, name, type(values)) != values:
        raise UserError(
            f"{path}: section {name} was changed while the stage ran, so DVC would record the wrong values. Run again."
        )


def parse_yaml(text: str) -> Any:
    """Parse YAML 1.2, in which `1e-4` is a number, as DVC does.

    Raises:
        YAMLError: The text is not YAML.
    """
    return YAML(typ="safe", pure=True).load(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: The file is missing, not YAML, or not a mapping.
    """
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Name an existing params file.") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}). Fix the file.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {document!r}. Fix the file.")
    return document


def check(values: Any, name: str, expected_type: type[T], source: str) -> T:
    """Validate plain values and convert them to a section dataclass or another type.

    Args:
        values: The values as parsed from YAML.
        name: Key of the values, as a prefix of the keys in errors.
        expected_type: Dataclass of the section, or type of the value.
        source: Name of the file in errors.

    Raises:
        UserError: A key is invalid; the message lists every invalid key.
    """
    try:
        return TypeAdapter(expected_type).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        faults = [_describe_fault(name, fault) for fault in error.errors()]
        message = summarize(faults, limit=10).removesuffix(".")
        raise UserError(f"{source}: {message}. Correct the values.") from None


def to_plain(values: Any) -> Any:
    """Convert a section back to plain values, as parsed from YAML."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")


def _describe_fault(name: str, fault: Mapping[str, Any]) -> str:
    key = ".".join([name, *(str(part) for part in fault["loc"])])
    match fault["type"]:
        case "missing":
            return f"{key} is missing"
        case "unexpected_keyword_argument":
            return f"{key} is not a valid key"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case _:
            expected = str(fault["msg"]).replace("Input should be", "must be")
            return f"{key} {expected}, got {json.dumps(fault['input'])}"
