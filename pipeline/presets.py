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
from pipeline.params import check, compose_yaml, find_yaml, parse_yaml, read_yaml, shorten

# This section is replaced, not merged: a mix of the keys of two datasets is never valid.
_REPLACED_SECTION = "dataset"
_BASE = "base"

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
    return find_yaml(name, folder, "preset")


def use(preset: Path, assignments: Sequence[str], params: Path) -> None:
    """Apply a preset, then assignments, to a params file.

    Mappings are merged, except section `dataset`, which is replaced. A preset with a key `base` is applied after the
    preset of that name in its folder.

    Args:
        preset: YAML file of the preset.
        assignments: Strings `KEY=VALUE`, such as `train.max_epochs=3`; values are YAML.
        params: The params file, which is rewritten atomically.

    Raises:
        UserError: A key is unknown, or a value is not YAML or invalid. The file is left unchanged.
    """
    read_yaml(params)
    text = params.read_text(encoding="utf-8")
    sections = set[str]()
    for path, overlay in _read_layers(preset):
        sections |= overlay.keys()
        if _REPLACED_SECTION in overlay:
            new = path.read_text(encoding="utf-8")
            (start, end), (new_start, new_end) = _section_span(text, params), _section_span(new, path)
            text = text[:start] + new[new_start:new_end] + text[end:]
        merged = {key: value for key, value in _leaves(overlay) if key[0] != _REPLACED_SECTION}
        text = _set(text, merged, params, str(path))
    for key, value, source in map(_parse_assignment, assignments):
        sections.add(key[0])
        text = _set(text, {key: value}, params, source)
    _check_sections(text, sections, f"{params} (left unchanged) with {preset}")
    write_atomically(params, text)


def _read_layers(preset: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read a preset and those that it is based on, in the order in which they are applied.

    Raises:
        UserError: A preset is not YAML, there is no such base, or a preset is based on itself.
    """
    layers: list[tuple[Path, dict[str, Any]]] = []
    path = preset
    while True:
        if path in (layer for layer, _ in layers):
            raise UserError(f"{path}: {_BASE}: the preset is based on itself. Name another preset.")
        overlay = read_yaml(path)
        layers.insert(0, (path, overlay))
        if _BASE not in overlay:
            return layers
        path = find_preset(check(overlay.pop(_BASE), _BASE, str, str(path)), path.parent)


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


def _set(text: str, values: dict[_Key, Any], params: Path, source: str) -> str:
    """Replace the values of keys, none of which is inside of another, with YAML in flow style."""
    document = compose_yaml(text)
    edits = [_edit(text, document, path, value, params, source) for path, value in values.items()]
    for (start, end), flow in sorted(edits, reverse=True):  # from the end, so that positions stay valid
        text = text[:start] + flow + text[end:]
    return text


def _edit(text: str, document: Node, path: _Key, value: Any, params: Path, source: str) -> tuple[tuple[int, int], str]:
    """Return start and end of a key's value, and its new text. Of several mappings in a list, each has its own line."""
    key, node = _find(document, path, params, source)
    start, end = _span(text, key, node)
    # Unlike a block list, a flow value needs a space after the colon and more indentation than its key.
    separator = " " if start == end or node.start_mark.column <= key.start_mark.column else ""
    line_break = "\n" + " " * (key.start_mark.column + 2)
    try:
        match value:
            case [dict(), dict(), *_]:
                flow = f"[{line_break}{f',{line_break}'.join(map(_to_flow, value))}]"
            case _:
                flow = _to_flow(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: {'.'.join(path)} must be null, a number, a string, a list or a mapping, got {value}."
            " Change the value."
        ) from error
    return (start, end), separator + flow


def _find(document: Node, path: _Key, params: Path, source: str) -> tuple[Node, Node]:
    key = node = document
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
