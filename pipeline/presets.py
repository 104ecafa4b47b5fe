"""Presets: overlays on `params.yaml` that set it to one dataset or one kind of model.

The file is edited in place in its text, so that comments, order and layout of all that does not change stay.
"""

import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.artifacts import write_atomically
from pipeline.errors import UserError
from pipeline.params import check, read_yaml

# Half of one dataset's section and half of another's is no dataset, so this one is never merged.
_REPLACED_WHOLE = "dataset"

_TYPED_SECTIONS = {
    "dataset": ("pipeline.captions.sources.dataset", "DatasetParams"),
    "tokenize": ("pipeline.captions.tokens", "TokenizeParams"),
    "encode": ("pipeline.features.encoder", "EncodeParams"),
    "train": ("pipeline.training.trainer", "TrainParams"),
    "generate": ("pipeline.generation.generate", "GenerateParams"),
    "evaluate": ("pipeline.evaluation.evaluate", "EvaluateParams"),
}

_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")

_Key = tuple[str, ...]


def find_preset(name: str, folder: Path) -> Path:
    """Path of the preset that a name in `folder` or a path of a YAML file stands for.

    Raises `UserError` where there is none, naming those that there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(preset.stem for preset in folder.glob("*.yaml"))
        others = f"one of {known} in {folder}" if known else "run this in a clone of gridcap, which has some"
        raise UserError(f"{path}: no such preset; name a YAML file or {others}")
    return path


def use(preset: Path, assignments: Sequence[str], params: Path) -> None:
    """Write a preset, and over it assignments such as `train.max_epochs=3`, into a params file.

    Mappings are merged, except section `dataset`, which is replaced whole. Values of assignments are YAML.
    Raises `UserError`, and leaves the file as it was, for unknown keys, for values that are no YAML and for
    those that a section does not take.
    """
    read_yaml(params)
    text = params.read_text(encoding="utf-8")
    overlay = read_yaml(preset)
    if _REPLACED_WHOLE in overlay:
        new = preset.read_text(encoding="utf-8")
        (start, end), (new_start, new_end) = _section_span(text, params), _section_span(new, preset)
        text = text[:start] + new[new_start:new_end] + text[end:]
    changes = [
        *((key, value, str(preset)) for key, value in _leaves(overlay) if key[0] != _REPLACED_WHOLE),
        *(_parse(assignment) for assignment in assignments),
    ]
    for key, value, source in changes:
        text = _set(text, key, value, params, source)
    _check(text, {*overlay, *(key[0] for key, _, _ in changes)}, params)
    write_atomically(params, text)


def _parse(assignment: str) -> tuple[_Key, Any, str]:
    key, equals, value = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"'{assignment}': wanted KEY=VALUE, such as train.seed=3")
    try:
        return tuple(key.split(".")), YAML(typ="safe", pure=True).load(value), f"'{assignment}'"
    except YAMLError as error:
        raise UserError(f"'{assignment}': the value is no valid YAML: {' '.join(str(error).split())}") from error


def _leaves(overlay: dict[str, Any], above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for name, value in overlay.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*above, str(name)))
        else:
            yield (*above, str(name)), value


def _check(text: str, sections: set[str], params: Path) -> None:
    values = YAML(typ="safe", pure=True).load(text)
    for name in sorted(sections & _TYPED_SECTIONS.keys()):
        module, into = _TYPED_SECTIONS[name]
        check(values[name], name, getattr(import_module(module), into), f"{params} (left unchanged)")


def _set(text: str, path: _Key, value: Any, params: Path, source: str) -> str:
    """Put a value, in flow style, in the place of the one that stands under a key."""
    key, node = _find(text, path, params, source)
    start, end = _span(text, key, node)
    # A flow value may not stand right after the colon, nor, as a block list may, right below its key.
    gap = " " if start == end or node.start_mark.column <= key.start_mark.column else ""
    try:
        return text[:start] + gap + _flow(value) + text[end:]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: {'.'.join(path)} must be null, a number, text, a list or a mapping, got {value}"
        ) from error


def _find(text: str, path: _Key, params: Path, source: str) -> tuple[Node, Node]:
    key = node = _compose(text)
    for depth, name in enumerate(path):
        children = {child[0].value: child for child in node.value} if isinstance(node, MappingNode) else {}
        if name not in children:
            known = ", ".join(children) or "none"
            raise UserError(f"{source}: {params} has no key '{'.'.join(path[: depth + 1])}'; known keys there: {known}")
        key, node = children[name]
    return key, node


def _compose(text: str) -> Node:
    node: Node = YAML(typ="safe", pure=True).compose(text)
    return node


def _span(text: str, key: Node | None, node: Node) -> tuple[int, int]:
    """Range of a value's own text: marks of blocks and empty values lie behind the comments that follow."""
    start, end = node.start_mark.index, node.end_mark.index
    match node:
        case MappingNode(flow_style=False):
            _, end = _span(text, *node.value[-1])
        case SequenceNode(flow_style=False):
            _, end = _span(text, None, node.value[-1])
        case ScalarNode() if start == end and key:
            start = end = text.index(":", key.end_mark.index) + 1
    return start, start + len(text[start:end].rstrip())


def _flow(value: Any) -> str:
    """One line of YAML: JSON, but with plain words unquoted. (What ruamel writes it cannot always read.)"""
    match value:
        case dict():
            return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(_flow, value)) + "]"
        case str() if _PLAIN.fullmatch(value) and YAML(typ="safe", pure=True).load(value) == value:
            return value
        case _:
            return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _section_span(text: str, path: Path) -> tuple[int, int]:
    """Range of the section that is replaced whole, from its key to the end of its last line."""
    for key, node in _compose(text).value:
        if key.value == _REPLACED_WHOLE:
            line_end = text.find("\n", _span(text, key, node)[1])
            return key.start_mark.index, len(text) if line_end < 0 else line_end
    raise UserError(f"{path}: has no section '{_REPLACED_WHOLE}'; restore it from git")
