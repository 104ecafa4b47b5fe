"""Generate docs/configuration.md from the params dataclasses, and the table of scores and the graph in README.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from ruamel.yaml import YAML

from pipeline.artifacts import read_json
from pipeline.params import read_yaml
from pipeline.presets import SECTIONS, section_class

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"

_RESULT_FILES = ("metrics", "plots", "report.html", "model_card.md")
"""Outputs of `evaluate` in the graph, below results."""

Schema = dict[str, Any]
"""A JSON schema."""

_INTRODUCTION = """\
# Configuration

Every setting that changes results is in [params.yaml](../params.yaml). This page lists all of its keys.
A section configures the stage of its name, and section `dataset` configures `prepare`. `make docs` generates this page
from the dataclasses that validate the file.

Unknown keys, missing keys and invalid values are errors that name the key. To change a value, edit the file, or run:

```sh
gridcap use flickr8k train.seed=2       # apply a preset, then set single keys
dvc exp run -S train.lr.peak=1e-3       # run an experiment
```

Settings that must not change results, such as the device, are not in the file:
[distributed.md](distributed.md#devices-and-threads) and `python -m stages.train_decoder --help` list them.
"""

_RESULTS = {
    "BLEU-4": ("scores", "BLEU-4"),
    "METEOR": ("scores", "METEOR"),
    "ROUGE-L": ("scores", "ROUGE-L"),
    "CIDEr-D": ("scores", "CIDEr-D"),
    "captions whose objects are all correct": ("scenes", "names", "accuracy"),
    "spatial relations that hold": ("scenes", "relations", "accuracy"),
    "attention peak inside the named object": ("scenes", "attention", "all", "peak_in_box"),
    "attention peak by chance": ("scenes", "attention", "all", "peak_by_chance"),
}
"""Rows of the table of scores in README.md: title, file in results/metrics, path of the value in it."""


def configuration_page(params: dict[str, Any]) -> str:
    """Return docs/configuration.md; `params` are the defaults."""
    parts = [_INTRODUCTION]
    for name in SECTIONS:
        schema = TypeAdapter(section_class(name)).json_schema()
        parts.append(f"## {name}\n")
        parts.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        parts.append("\n".join(_rows(schema, schema.get("$defs", {}), name, params[name])) + "\n")
    return "\n".join(parts)


def stage_graph() -> str:
    """Return a Mermaid flowchart of the stages in dvc.yaml, with an edge for every artifact that a stage reads."""
    stages = _stages()
    producers = {path: name for name, stage in stages.items() for path in _paths(stage["outs"])}
    edges = []
    for name, stage in stages.items():
        for path in _paths(stage["deps"]):
            if path in producers:
                edges.append(f"    {producers[path]} -->|{path}| {name}")
            elif not path.startswith(("pipeline/", "stages/")):
                edges.append(f"    {_node(path)} --> {name}")
    edges += [f"    evaluate --> {_node(f'results/{name}')}" for name in _RESULT_FILES]
    return "\n".join(["flowchart LR", *edges])


def results_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Return the table of scores of the default run; `metrics` are files of results/metrics by stem."""
    subsets = ("seen", "held-out")
    scores = metrics["scores"]
    counts = [scores["num_images"], *(scores["subsets"][subset]["num_images"] for subset in subsets)]
    lines = ["| | test | seen | held-out |", "| --- | --- | --- | --- |", _row("images", map(str, counts))]
    for title, (file, *path) in _RESULTS.items():
        values = [_value(metrics[file], path), *(_value(metrics[file]["subsets"][subset], path) for subset in subsets)]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        interval = metrics[file].get("intervals", {}).get(path[0])
        if interval:
            cells[0] += f" ({interval[0]:.3f} to {interval[1]:.3f})"
        lines.append(_row(title, cells))
    return "\n".join(lines)


def replace_block(page: str, name: str, content: str) -> str:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->`."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not block.search(page):
        raise ValueError(f"the page has no block <!-- {name} -->")
    return block.sub(lambda match: f"{match[1]}{content}\n{match[2]}", page)


def readme(page: str, metrics: dict[str, dict[str, Any]]) -> str:
    """Return README.md, given as `page`, with new generated blocks."""
    page = replace_block(page, "results", results_table(metrics))
    return replace_block(page, "graph", f"```mermaid\n{stage_graph()}\n```")


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the metrics files of the table of scores."""
    names = {file for file, *_ in _RESULTS.values()}
    return {name: read_json(folder / f"{name}.json", dict[str, Any], "Run `dvc repro`.") for name in names}


def main() -> None:
    """Rewrite the generated pages."""
    CONFIGURATION.write_text(configuration_page(read_yaml(ROOT / "params.yaml")), encoding="utf-8")
    path = ROOT / "README.md"
    page = path.read_text(encoding="utf-8")
    path.write_text(readme(page, read_metrics(ROOT / "results/metrics")), encoding="utf-8")


def _stages() -> dict[str, Any]:
    """Read the stages of dvc.yaml, with its variables replaced by their values and params by their keys."""
    document = YAML(typ="safe").load(ROOT / "dvc.yaml")
    variables = {name: path for entry in document["vars"] for name, path in entry.items()}
    text = json.dumps(document["stages"])
    stages: dict[str, Any] = json.loads(re.sub(r"\$\{([\w.]+)\}", lambda m: variables.get(m[1], m[1]), text))
    return stages


def _paths(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def _node(path: str) -> str:
    return f"{re.sub(r'[^a-z]', '_', path)}[{path}]"


def _row(title: str, cells: Any) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _value(values: Any, path: list[str]) -> Any:
    """Return the value at a path of keys; None if the last key is missing."""
    for key in path[:-1]:
        values = values[key]
    return values.get(path[-1])


def _rows(schema: Schema, definitions: dict[str, Schema], prefix: str, values: Any, note: str = "") -> Iterator[str]:
    """Yield the table rows of a section and of the sections nested in it.

    Args:
        schema: JSON schema of the section.
        definitions: Schemas that it refers to, by name.
        prefix: Key of the section.
        values: Defaults of the section; None for none.
        note: Text after each key, such as the alternative that the key belongs to.
    """
    for key, field in schema["properties"].items():
        name, value = f"{prefix}.{key}", None if values is None else values[key]
        nested_schemas = [_resolve(reference, definitions) for reference in _references(field)]
        if "$ref" in field:
            yield from _rows(nested_schemas[0], definitions, name, value)
            continue
        if "const" not in field:
            default = "" if values is None else _default(value)
            meaning = " ".join(field["description"].split())
            yield f"| `{name}`{note} | {_type(field, definitions)} | {default} | {meaning} |"
        for nested in nested_schemas:
            by = nested["properties"].get("by")
            suffix = f" (by: {by['const']})" if by else ""
            yield from _rows(nested, definitions, f"{name}[]" if "items" in field else name, None, suffix)


def _default(value: Any) -> str:
    if isinstance(value, list):
        return _code(f"[{', '.join(value)}]") if all(isinstance(item, str) for item in value) else f"{len(value)} files"
    return _code(value)


def _references(field: Schema) -> list[str]:
    """Return the references to the schemas of a field's values or items."""
    references = [field["$ref"]] if "$ref" in field else []
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ()), *filter(None, [field.get("items")])):
        references += _references(part)
    return references


def _resolve(reference: str, definitions: dict[str, Schema]) -> Schema:
    return definitions[reference.rpartition("/")[2]]


def _type(field: Schema, definitions: dict[str, Schema]) -> str:
    """Describe the type of a field with its choices or bounds."""
    match field:
        case {"anyOf": choices}:
            return ", ".join(_type(choice, definitions) for choice in choices)
        case {"oneOf": choices}:
            return ", ".join(_type(choice, definitions) for choice in choices)
        case {"$ref": reference}:
            properties = _resolve(reference, definitions)["properties"]
            by = properties.get("by")
            return _code(f"{{by: {by['const']}, ...}}" if by else f"{{{', '.join(properties)}}}")
        case {"enum": choices}:
            return ", ".join(map(_code, choices))
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "null"}:
            return "`null`"
    names = {"integer": "integer", "number": "float", "string": "string", "array": "list", "object": "mapping"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    name = "path" if field.get("format") == "path" else names[field["type"]]
    return " ".join([name, ", ".join(limits)]).strip()


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    main()
