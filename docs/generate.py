"""Generate docs/configuration.md, and the tables and the graph in README.md, from the code: `make docs`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from ruamel.yaml import YAML

from pipeline.params import read_yaml
from pipeline.presets import SECTIONS, section_class

ROOT = Path(__file__).parents[1]
CONFIGURATION = ROOT / "docs" / "configuration.md"

Schema = dict[str, Any]
"""A JSON schema."""

_INTRODUCTION = """\
# Configuration

Every setting that changes results stands in [params.yaml](../params.yaml). This page lists all of its keys with type,
default and meaning, one table for each section; a section belongs to the stage that reads it. It is generated from the
dataclasses that check the file (`make docs`).

Unknown keys, missing keys and invalid values are errors that name the key. Ways to change a value:

```sh
gridcap use flickr8k train.seed=2       # a preset, with single keys set on top of it
dvc exp run -S train.lr.peak=1e-3       # one experiment
```

Settings of the machine, which must not change results, are flags and environment variables instead: `GRIDCAP_DEVICE`
(`auto`, `cpu`, `cuda`), `OMP_NUM_THREADS`, and the flags of each stage (`python -m stages.train_decoder --help`).
"""

_TITLES = {
    "dataset": "read by `prepare`",
    "tokenize": "read by `tokenize`",
    "encode": "read by `encode`",
    "train": "read by `train`",
    "generate": "read by `generate`",
    "evaluate": "read by `evaluate`",
}

# The scores of the default run in README.md: row title, file in results/metrics, path in it.
_RESULTS = {
    "BLEU-4": ("scores", "BLEU-4"),
    "METEOR": ("scores", "METEOR"),
    "ROUGE-L": ("scores", "ROUGE-L"),
    "CIDEr-D": ("scores", "CIDEr-D"),
    "captions whose objects are all correct": ("scenes", "names", "accuracy"),
    "spatial relations that hold": ("scenes", "relations", "accuracy"),
    "attention peak inside the named object": ("scenes", "attention", "all", "peak_in_box"),
    "the same by chance": ("scenes", "attention", "all", "peak_by_chance"),
}


def configuration_page(params: dict[str, Any]) -> str:
    """Write the page of all keys; `params` holds the defaults."""
    parts = [_INTRODUCTION]
    for name in SECTIONS:
        schema = TypeAdapter(section_class(name)).json_schema()
        parts.append(f"## {name}\n\nSection `{name}`, {_TITLES[name]}.\n")
        parts.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        parts.append("\n".join(_rows(schema, schema.get("$defs", {}), name, params[name])) + "\n")
    return "\n".join(parts)


def stage_graph() -> str:
    """Draw the stages of dvc.yaml as a Mermaid flowchart: an edge for every artifact that a stage reads."""
    stages = _stages()
    producers = {path: name for name, stage in stages.items() for path in _paths(stage["outs"])}
    edges = []
    for name, stage in stages.items():
        for path in _paths(stage["deps"]):
            if path in producers:
                edges.append(f"    {producers[path]} -->|{path}| {name}")
            elif not path.startswith(("pipeline/", "stages/")):
                edges.append(f"    {_node(path)} --> {name}")
    edges += [f"    evaluate --> {_node(path)}" for path in ("results/metrics", "results/plots", "results/report.html")]
    return "\n".join(["flowchart LR", *edges])


def results_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Write the table of scores of the default run; `metrics` are files of results/metrics by stem."""
    subsets = ("seen", "held-out")
    scores = metrics["scores"]
    counts = [scores["num_images"], *(scores["subsets"][subset]["num_images"] for subset in subsets)]
    lines = ["| | test | seen | held-out |", "| --- | --- | --- | --- |", _row("images", map(str, counts))]
    for title, (file, *path) in _RESULTS.items():
        values = [_reach(metrics[file], path), *(_reach(metrics[file]["subsets"][subset], path) for subset in subsets)]
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
        raise ValueError(f"the page has no block {name}")
    return block.sub(lambda match: f"{match[1]}{content}\n{match[2]}", page)


def readme(page: str, metrics: dict[str, dict[str, Any]]) -> str:
    """Update the generated blocks of README.md."""
    page = replace_block(page, "results", results_table(metrics))
    return replace_block(page, "graph", f"```mermaid\n{stage_graph()}\n```")


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the files that the table of results shows."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("scores", "scenes")}


def main() -> None:
    """Rewrite the generated pages."""
    CONFIGURATION.write_text(configuration_page(read_yaml(ROOT / "params.yaml")), encoding="utf-8")
    path = ROOT / "README.md"
    page = path.read_text(encoding="utf-8")
    path.write_text(readme(page, read_metrics(ROOT / "results/metrics")), encoding="utf-8")


def _stages() -> dict[str, Any]:
    document = YAML(typ="safe").load(ROOT / "dvc.yaml")
    folders = {name: path for entry in document["vars"] for name, path in entry.items()}
    text = json.dumps(document["stages"])
    stages: dict[str, Any] = json.loads(re.sub(r"\$\{([\w.]+)\}", lambda m: folders.get(m[1], m[1]), text))
    return stages


def _paths(entries: list[Any]) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def _node(path: str) -> str:
    return f"{re.sub(r'[^a-z]', '_', path)}[{path}]"


def _row(title: str, cells: Any) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _reach(values: Any, path: list[str]) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values.get(path[-1])


def _rows(schema: Schema, forms: dict[str, Schema], prefix: str, values: Any, note: str = "") -> Iterator[str]:
    """Yield the rows of a section and of the sections in it; without `values` there are no defaults."""
    for key, field in schema["properties"].items():
        name, value = f"{prefix}.{key}", None if values is None else values[key]
        nested = [_form(reference, forms) for reference in _references(field)]
        if "$ref" in field:
            yield from _rows(nested[0], forms, name, value)
            continue
        if "const" not in field:
            default = "" if values is None else _default(value)
            meaning = " ".join(field["description"].split())
            yield f"| `{name}`{note} | {_type(field, forms)} | {default} | {meaning} |"
        for form in nested:
            by = form["properties"].get("by")
            suffix = f" (by: {by['const']})" if by else ""
            yield from _rows(form, forms, name if by else f"{name}[]", None, suffix)


def _default(value: Any) -> str:
    if isinstance(value, list):
        return _code(f"[{', '.join(value)}]") if all(isinstance(item, str) for item in value) else f"{len(value)} files"
    return _code(value)


def _references(field: Schema) -> list[str]:
    """References to the forms of a field's values or items."""
    references = [field["$ref"]] if "$ref" in field else []
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ()), *filter(None, [field.get("items")])):
        references += _references(part)
    return references


def _form(reference: str, forms: dict[str, Schema]) -> Schema:
    return forms[reference.rpartition("/")[2]]


def _type(field: Schema, forms: dict[str, Schema]) -> str:
    match field:
        case {"anyOf": choices}:
            return ", ".join(_type(choice, forms) for choice in choices)
        case {"oneOf": choices}:
            kinds = [_form(choice["$ref"], forms)["properties"]["by"]["const"] for choice in choices]
            return ", ".join(f"`{{by: {kind}, ...}}`" for kind in kinds)
        case {"enum": choices}:
            return ", ".join(map(_code, choices))
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "null"}:
            return "`null`"
    names = {"integer": "integer", "number": "float", "string": "string", "array": "list"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    kind = "path" if field.get("format") == "path" else names[field["type"]]
    return " ".join([kind, ", ".join(limits)]).strip()


def _code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    main()
