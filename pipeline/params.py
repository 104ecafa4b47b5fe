"""Typed params: one frozen dataclass without defaults for each section of `params.yaml`, validated when it is read."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError, YAMLWarning
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.errors import UserError, summarize

T = TypeVar("T")

MAX_DEPTH = 20
"""Maximum levels of mappings and lists in a params file."""
MAX_VALUES = 100_000
"""Maximum number of values in a params file, with aliases expanded."""
MAX_INTEGER = 2**63 - 1
"""Maximum absolute value of an integer in a params file."""
DISCRIMINATOR = "by"
"""Key that selects the dataclass of a mapping where the params allow several."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _require_dependency(value: object) -> object:
    """Check that dvc.yaml can have a path as a dependency. DVC accepts all other characters.

    Raises:
        ValueError: The path is empty, a URL, the name of a DVC file, or has an escape of DVC's templates.
    """
    if isinstance(value, str):
        name = PurePosixPath(value).name
        if not value:
            raise ValueError("must not be empty")
        if _URL.match(value):
            raise ValueError(f"must be a local path, not the URL {value!r}")
        if name.endswith(".dvc") or name == "dvc.yaml":
            raise ValueError(f"must not have the name of a DVC file, got {value!r}")
        if "\\${" in value:
            raise ValueError(f"must not contain \\${{, which DVC replaces with ${{, got {value!r}")
    return value


DEPENDENCY = BeforeValidator(_require_dependency)
"""Annotation of a path that is a dependency in dvc.yaml."""

_SCALAR_ERRORS = (ValueError, OverflowError, LookupError)
"""Errors of scalars such as 2024-13-45, an integer of 5,000 digits, or `!!bool maybe`."""


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


def parse_yaml(text: str, source: str, name: str = "") -> Any:
    """Parse YAML 1.2, in which `1e-4` is a number, as DVC does.

    Args:
        text: The YAML.
        source: Name of the file or argument in errors.
        name: Key of the value, as a prefix of the keys in errors.

    Returns:
        None, booleans, numbers, strings, and lists and mappings of them.

    Raises:
        UserError: The text is not YAML, or has other values, such as dates.
    """
    try:
        value = _load(text)
    except YAMLError as error:
        raise UserError(f"{source}: not valid YAML ({' '.join(str(error).split())}). Correct it.") from error
    except RecursionError as error:
        key = _join(name, _deep_key(text))
        raise UserError(f"{source}: {key} is nested deeper than {MAX_DEPTH} levels. Change the value.") from error
    except _SCALAR_ERRORS as error:
        key = _invalid_key(text, name) or "a value"
        raise UserError(f"{source}: {key} is not valid ({error}). Correct the value.") from error
    _require_plain(value, source, name)
    return value


def compose_yaml(text: str) -> Node:
    """Parse YAML to nodes, which have positions in the text. Scalars stay text."""
    with _without_warnings():
        node: Node = YAML(typ="safe", pure=True).compose(text)
    return node


def _load(text: str) -> Any:
    with _without_warnings():
        return YAML(typ="safe", pure=True).load(text)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence warnings, such as those about the second use of an anchor, which YAML allows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", YAMLWarning)
        yield


def _invalid_key(text: str, name: str) -> str | None:
    """Return the key of a scalar that is not valid, which the error does not name; None if it is not found."""
    try:
        return next((key for key, node in _scalars(compose_yaml(text), name) if not _is_valid(node)), None)
    except OverflowError:  # an escape such as \UFFFFFFFF, at which not even the scalars can be told apart
        return None


def _deep_key(text: str) -> str:
    """Return the section, or key of the outermost mapping, that is nested deeper than `MAX_DEPTH`."""
    depth, key = 0, ""
    for event in YAML(typ="safe", pure=True).parse(text):
        match event:
            case CollectionStartEvent():
                depth += 1
            case CollectionEndEvent():
                depth -= 1
            case ScalarEvent() if depth == 1:
                key = event.value
        if depth > MAX_DEPTH:
            break
    return key


def _scalars(node: Node, key: str) -> Iterator[tuple[str, ScalarNode]]:
    """Yield the scalars below a node with their keys."""
    match node:
        case ScalarNode():
            yield key, node
        case MappingNode():
            for name, child in node.value:
                yield from _scalars(child, _join(key, name.value))
        case SequenceNode():
            for index, child in enumerate(node.value):
                yield from _scalars(child, _join(key, index))


def _is_valid(node: ScalarNode) -> bool:
    try:
        YAML(typ="safe", pure=True).constructor.construct_object(node)
    except (YAMLError, *_SCALAR_ERRORS):
        return False
    return True


def _join(key: str, name: object) -> str:
    return ".".join(filter(None, [key, str(name)]))


def _require_plain(value: Any, source: str, name: str) -> None:
    """Check that a value has only the types of JSON, is finite in size, and does not contain itself.

    Raises:
        UserError: A value is not plain; the message names its key.
    """
    num_values = 0

    def visit(value: Any, key: str, parents: tuple[int, ...]) -> None:
        nonlocal num_values
        num_values += 1
        fault = _plain_fault(value, parents)
        if fault is None and num_values > MAX_VALUES:
            fault = f"must have at most {MAX_VALUES:,} values, with aliases expanded"
        if fault is not None:
            raise UserError(f"{source}: {key or 'the document'} {fault}. Change the value.")
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for child_name, child in children:
            if isinstance(value, dict) and not isinstance(child_name, str):
                raise UserError(
                    f"{source}: {key or 'the document'} must have strings as keys, got {_format(child_name)}."
                    " Write the key in quotes, or correct it."
                )
            visit(child, _join(key, child_name), (*parents, id(value)))

    visit(value, name, ())


def _plain_fault(value: Any, parents: tuple[int, ...]) -> str | None:
    """Describe why a value is not plain, its items aside; None if it is plain."""
    match value:
        case None | bool() | float():
            return None
        case int() if abs(value) > MAX_INTEGER:
            return f"must be an integer from -2^63 + 1 to 2^63 - 1, got {_format(value)}"
        case str() if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
            return "must be text without NUL and unpaired surrogates"
        case int() | str():
            return None
        case dict() | list() if id(value) in parents:
            return "must not contain itself"
        case dict() | list() if len(parents) >= MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels"
        case dict() | list():
            return None
    return f"must be null, a number, a string, a list or a mapping, got the {type(value).__name__} {_format(value)}"


def _format(value: Any) -> str:
    """Format a value for an error."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    try:
        return shorten(json.dumps(value, ensure_ascii=False))
    except TypeError:
        return shorten(str(value))


def shorten(text: str) -> str:
    """Truncate a text for an error to 80 characters."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: The file is missing, not YAML, not a mapping, or has values such as dates.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Name an existing params file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML ({error}). Save the file as UTF-8.") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: must be a mapping of sections, got {_format(document)}. Fix the file.")
    return document


def find_yaml(name: str, folder: Path, kind: str, *alternatives: str) -> Path:
    """Return the path of a YAML file that is named on the command line.

    Args:
        name: Name of a file in `folder` without its suffix, or path of a YAML file.
        folder: Folder of the named files.
        kind: What the files are, for errors, such as `preset`.
        *alternatives: Other valid arguments, for errors.

    Raises:
        UserError: There is no such file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        choices = [f"one of {', '.join(names)}", "a YAML file"] if names else [f"a YAML file ({kind}s are in a clone)"]
        *others, last = *choices, *alternatives
        raise UserError(f"{path}: no such {kind}. Use {', '.join([*others, f'or {last}' if others else last])}.")
    return path


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
        faults = [_describe_fault(name, values, fault) for fault in error.errors()]
        message = summarize(faults, limit=10).removesuffix(".")
        raise UserError(f"{source}: {message}. Correct the values.") from None


def to_plain(values: Any) -> Any:
    """Convert a section back to plain values, as parsed from YAML."""
    return TypeAdapter(type(values)).dump_python(values, mode="json")


def _describe_fault(name: str, values: Any, fault: Mapping[str, Any]) -> str:
    key = ".".join([name, *_location(values, fault["loc"])])
    match fault["type"]:
        case "missing":
            return f"{key} is missing"
        case "union_tag_not_found":
            return f"{key}.{DISCRIMINATOR} is missing"
        case "union_tag_invalid":
            context = fault["ctx"]
            tags, tag = context["expected_tags"], _format(context["tag"])
            return f"{key}.{DISCRIMINATOR} must be one of {tags}, got {tag}"
        case "unexpected_keyword_argument":
            return f"{key} is not a valid key"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
        case "dataclass_type" | "dict_type" | "model_attributes_type":
            return f"{key} must be a mapping, got {_format(fault['input'])}"
        case "tuple_type" | "list_type":
            return f"{key} must be a list, got {_format(fault['input'])}"
        case _:
            expected = str(fault["msg"]).replace("Input should be", "must be")
            return f"{key} {expected}, got {_format(fault['input'])}"


def _location(values: Any, parts: Sequence[int | str]) -> list[str]:
    """Return the keys of a fault, without the tags that pydantic inserts for unions."""
    keys = []
    tagged: Any = None  # the mapping whose tag has been removed
    for part in parts:
        if isinstance(values, dict) and values is not tagged and values.get(DISCRIMINATOR) == part:
            tagged = values
            continue
        if str(part).startswith("<"):  # the tag of a union without a discriminator
            continue
        keys.append(str(part))
        try:
            values = values[part]
        except LookupError:  # the key is missing
            values = None
    return keys
