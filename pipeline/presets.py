"""Presets: YAML overlays that switch `params.yaml` to another dataset or model.

The text of the file is edited in place, so comments, order and layout are kept.
"""

import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.artifacts import write_atomically
from pipeline.errors import UserError
from pipeline.params import check, compose_yaml, parse_yaml, read_yaml, shorten

# This section is replaced, not merged: a mix of the keys of two datasets is never valid.
_REPLACED_SECTION = "dataset"

SECTIONS = {
    "dataset": ("pipeline.captions.sources.dataset", "DatasetParams"),
    "tokenize": ("pipeline.captions.tokenizer", "TokenizeParams"),
    "encode": ("pipeline.features.encoder", "EncodeParams"),
    "train": ("pipeline.training.trainer", "TrainParams"),
    "refine": ("pipeline.training.self_critical", "RefineParams"),
    "generate": ("pipeline.generation.generate", "GenerateParams"),
    "evaluate": ("pipeline.evaluation.evaluate", "EvaluateParams"),
}
"""Module and dataclass of every section of `params.yaml`."""

# A leading dot needs a slash after it: YAML readers try `._` as a number.
_PLAIN_SCALAR = re.compile(r"(?:\.{0,2}/|[A-Za-z_])[\w./-]*")

_Key = tuple[str, ...]


def section_class(name: str) -> type[Any]:
    """Import the dataclass of a section of `params.yaml`."""
    module, section = SECTIONS[name]
    section_type: type[Any] = getattr(import_module(module), section)
    return section_type


def find_preset(name: str, folder: Path) -> Path:
    """Return the path of a preset.

    Args:
        name: Name of a preset in `folder`, or path of a YAML file.
        folder: Folder of the presets.

    Raises:
        UserError: There is no such preset.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        names = sorted(preset.stem for preset in folder.glob("*.yaml"))
        remedy = f"Use a YAML file or one of {', '.join(names)}." if names else "Run this in a clone of gridcap."
        raise UserError(f"{path}: no such preset. {remedy}")
    return path


def use(preset: Path, assignments: Sequence[str], params: Path) -> None:
    """Apply a preset, then assignments, to a params file.

    Mappings are merged, except section `dataset`, which is replaced.

    Args:
        preset: YAML file of the preset.
        assignments: Strings `KEY=VALUE`, such as `train.max_epochs=3`; values are YAML.
        params: The params file, which is rewritten atomically.

    Raises:
        UserError: A key is unknown, or a value is not YAML or invalid. The file is left unchanged.
    """
    read_yaml(params)
    text = params.read_text(encoding="utf-8")
    overlay = read_yaml(preset)
    if _REPLACED_SECTION in overlay:
        new = preset.read_text(encoding="utf-8")
        (start, end), (new_start, new_end) = _section_span(text, params), _section_span(new, preset)
        text = text[:start] + new[new_start:new_end] + text[end:]
    changes = [
        *((key, value, str(preset)) for key, value in _leaves(overlay) if key[0] != _REPLACED_SECTION),
        *(_parse_assignment(assignment) for assignment in assignments),
    ]
    for key, value, source in changes:
        text = _set(text, key, value, params, source)
    _check_sections(text, {*overlay, *(key[0] for key, _, _ in changes)}, f"{params} (left unchanged) with {preset}")
    write_atomically(params, text)


def _parse_assignment(assignment: str) -> tuple[_Key, Any, str]:
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"'{assignment}': not an assignment. Write KEY=VALUE, such as train.seed=3.")
    source = f"'{shorten(assignment)}'"
    return tuple(key.split(".")), parse_yaml(value, source, key), source


def _leaves(overlay: dict[str, Any], prefix: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for name, value in overlay.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, str(name)))
        else:
            yield (*prefix, str(name)), value


def _check_sections(text: str, sections: set[str], source: str) -> None:
    values = parse_yaml(text, source)
    for name in sorted(sections & SECTIONS.keys()):
        check(values[name], name, section_class(name), source)


def _set(text: str, path: _Key, value: Any, params: Path, source: str) -> str:
    """Replace the value of a key with YAML in flow style."""
    key, node = _find(text, path, params, source)
    start, end = _span(text, key, node)
    # Unlike a block list, a flow value needs a space after the colon and more indentation than its key.
    separator = " " if start == end or node.start_mark.column <= key.start_mark.column else ""
    try:
        return text[:start] + separator + _to_flow(value) + text[end:]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: {'.'.join(path)} must be null, a number, a string, a list or a mapping, got {value}."
            " Change the value."
        ) from error


def _find(text: str, path: _Key, params: Path, source: str) -> tuple[Node, Node]:
    key = node = compose_yaml(text)
    for depth, name in enumerate(path):
        children = {child[0].value: child for child in node.value} if isinstance(node, MappingNode) else {}
        if name not in children:
            valid_keys = ", ".join(children) or "none"
            raise UserError(f"{source}: {params} has no key {'.'.join(path[: depth + 1])}. Valid keys: {valid_keys}.")
        key, node = children[name]
    return key, node


def _span(text: str, key: Node | None, node: Node) -> tuple[int, int]:
    """Return start and end of a value's text, without the comments that the end marks of blocks include."""
    start, end = node.start_mark.index, node.end_mark.index
    match node:
        case MappingNode(flow_style=False):
            _, end = _span(text, *node.value[-1])
        case SequenceNode(flow_style=False):
            _, end = _span(text, None, node.value[-1])
        case ScalarNode() if start == end and key:
            start = end = text.index(":", key.end_mark.index) + 1
    return start, start + len(text[start:end].rstrip())


def _to_flow(value: Any) -> str:
    """Format a value as one line of YAML: JSON with plain strings unquoted.

    ruamel.yaml cannot read back everything that it writes itself.
    """
    match value:
        case dict():
            return "{" + ", ".join(f"{_to_flow(key)}: {_to_flow(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_to_flow, value)) + "]"
        case str() if _PLAIN_SCALAR.fullmatch(value) and parse_yaml(value, value) == value:
            return value
        case _:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _section_span(text: str, path: Path) -> tuple[int, int]:
    """Return start and end of the replaced section, from its key to the end of its last line."""
    for key, node in compose_yaml(text).value:
        if key.value == _REPLACED_SECTION:
            line_end = text.find("\n", _span(text, key, node)[1])
            return key.start_mark.index, len(text) if line_end < 0 else line_end
    raise UserError(f"{path}: section {_REPLACED_SECTION} is missing. Restore it from git.")
