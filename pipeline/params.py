"""Typed params: one frozen dataclass a section of `params.yaml`, without defaults, checked when it is read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import UserError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make a class one section of the params: frozen, keyword-only, strictly typed, no unknown keys.

    The sentence under a field is its documentation: it gives the unit and the effect.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
    return cast(type[T], pydantic_dataclass(cls, frozen=True, kw_only=True, config=config))


def load(path: Path, name: str, into: type[T]) -> T:
    """Read the section `name` of a params file into the section class `into`.

    Raises `UserError`, naming the file and the key, for a file that is missing or no YAML, and for an unknown,
    missing or ill-typed key.
    """
    document = read_yaml(path)
    if name not in document:
        raise UserError(f"{path}: has no section '{name}'; add it, or restore it from git")
    return check(document[name], name, into, str(path))


def require_unchanged(path: Path, name: str, values: Any) -> None:
    """See at a stage's end that a section still holds the `values` that were read from it at the beginning.

    DVC takes the params that it finds at the end for those that made what the stage wrote. Raises `UserError` where
    they are others.
    """
    if load(path, name, type(values)) != values:
        raise UserError(
            f"{path}: section '{name}' was changed while this ran, and DVC would take what was made by the old values"
            " for that of the new ones; run again"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 file that holds a mapping (`1e-4` is a number there, as it is for DVC).

    Raises `UserError` where the file is missing, is no YAML or holds anything but a mapping.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name an existing params file") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: must hold a mapping of sections, got {document!r}")
    return document


def check(values: Any, name: str, into: type[T], source: str) -> T:
    """Make the section class `into` from plain values; `source` is the file that an error names.

    Raises `UserError` naming each key at fault.
    """
    try:
        return TypeAdapter(into).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_sentence(name, fault) for fault in error.errors())) from None


def plain(values: Any) -> Any:
    """Turn a section back into plain values, as they stand in the file: for fingerprints and for writing down."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")


def _sentence(name: str, fault: Mapping[str, Any]) -> str:
    key = ".".join([name, *(str(part) for part in fault["loc"])])
    match fault["type"]:
        case "missing":
            return f"{key} is missing"
        case "unexpected_keyword_argument":
            return f"{key} is not a known key"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case _:
            wanted = str(fault["msg"]).replace("Input should be", "must be")
            return f"{key} {wanted}, got {json.dumps(fault['input'])}"
