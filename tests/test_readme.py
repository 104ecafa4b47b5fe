"""README.md tells the truth: its tables, its commands, its links and its lines of Python."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.captions.sources.dataset import DatasetParams
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.cli import app
from pipeline.evaluation.evaluate import EvaluateParams
from pipeline.features.encoder import EncodeParams
from pipeline.features.store import write_index, write_shard
from pipeline.generation.generate import GenerateParams
from pipeline.params import check, read_yaml
from pipeline.presets import find_preset, use
from pipeline.training.trainer import TrainParams
from tests.factories import small_spec
from tests.tiny_captioner import Tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
SHELL = "".join(block for language, block in BLOCKS if language in ("sh", "console")).replace("\\\n", " ")
CODE = SHELL + "\n".join(re.findall(r"`([^`\n]+)`", BLOCK.sub("", README)))
SECTIONS = {
    "dataset": DatasetParams,
    "tokenize": TokenizeParams,
    "encode": EncodeParams,
    "train": TrainParams,
    "generate": GenerateParams,
    "evaluate": EvaluateParams,
}

Form = dict[str, Any]
"""A JSON schema."""

# What the README calls a figure, and where it stands in results/metrics: in the whole, and in each subset.
SCORES = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "CIDEr-D")
SCENE_SCORES = {
    "captions with all objects named rightly": ("names", "accuracy"),
    "statements of place that hold": ("relations", "accuracy"),
    "strongest attention on the object named": ("attention", "all", "peak_in_box"),
    "the same by chance": ("attention", "all", "peak_by_chance"),
}


def test_the_table_of_params_has_every_key_with_its_type_default_and_meaning() -> None:
    present = table_of_params(read_yaml(ROOT / "params.yaml"))
    # Whoever tries other settings has not changed what the defaults are.
    shown = git("show", "HEAD:params.yaml")
    committed = table_of_params(YAML(typ="safe", pure=True).load(shown)) if shown else present
    assert present in README or committed in README, f"README.md lacks this table:\n\n{present}\n"


def test_the_table_of_stages_is_that_of_the_graph() -> None:
    table = table_of_stages()
    assert table in README, f"README.md lacks this table:\n\n{table}\n"


def test_the_table_of_results_holds_what_the_default_run_gave() -> None:
    # The committed results: another machine rounds otherwise, and whoever tries other settings has other ones.
    shown = [git("show", f"HEAD:results/metrics/{name}.json") for name in ("scores", "scenes")]
    if not all(shown):
        pytest.skip("no git history that holds results/metrics")
    table = table_of_results(*map(json.loads, shown))
    assert table in README, f"the committed results/metrics make this table in README.md:\n\n{table}\n"


def test_no_figure_is_left_open() -> None:
    assert re.findall(r"\{\{.*?\}\}", README) == []


def test_links_and_pictures_resolve() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    headings = re.findall(r"(?m)^#+ (.*)$", BLOCK.sub("", README))
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert links
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []


def test_the_house_is_as_drawn() -> None:
    (house,) = (block for _, block in BLOCKS if block.startswith("pipeline/"))
    assert set(re.findall(r"(?m)^  (\w+)/", house)) == {
        path.parent.name for path in ROOT.glob("pipeline/*/__init__.py")
    }
    rooms = re.findall(r"(?m)^(\w+)/", house)
    assert [room for room in rooms if not (ROOT / room).is_dir()] == []


def test_commands_exist() -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    subcommands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {"repro", "test"} <= named(r"make ([\w-]+)") <= targets
    shown = {"use", "inspect", "mend", "predict", "attend", "export", "score", "compare"}
    assert shown <= named(r"(?:\$ )?gridcap (\w[\w-]*)") <= subcommands
    assert {"train", "encode"} <= named(r"dvc repro (?:-\w+ )*([\w-]+)") <= stages("dvc.yaml").keys()


def test_settings_that_commands_change_exist(tmp_path: Path) -> None:
    settings = named(r"(?:-S|--set-param) (\S+=\S+)")
    assert settings
    shutil.copy(ROOT / "params.yaml", tmp_path)
    use(ROOT / "presets/scenes.yaml", sorted(settings), tmp_path / "params.yaml")


@pytest.mark.parametrize("command", re.findall(r"(?m)^gridcap use .*$", SHELL))
def test_a_preset_with_its_assignments_makes_valid_params(command: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    _, _, preset, *assignments = shlex.split(command, comments=True)
    use(find_preset(preset, ROOT / "presets"), assignments, tmp_path / "params.yaml")
    written = read_yaml(tmp_path / "params.yaml")
    for name, params_section in SECTIONS.items():
        check(written[name], name, params_section, command)


def test_the_lines_of_python_read_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for language, block in BLOCKS if language == "python" and "h5py" in block)
    folder = tmp_path / "data/features"
    spec = small_spec()
    grids = np.arange(24, dtype=np.float16).reshape(2, 4, 3)
    shard = write_shard(folder, spec, [5, 1_000_000], [("a" * 64, "whole"), ("b" * 64, "whole")], grids)
    write_index(folder, spec, ("whole",), [shard], {5: "a" * 64, 1_000_000: "b" * 64})
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert np.array_equal(names["grid"], grids[1])


def test_the_lines_of_python_caption_a_picture(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for language, block in BLOCKS if language == "python" and "Captioner" in block)
    shutil.copytree(tiny.model, tmp_path / "data/model")
    shutil.copy(tiny.images / "00.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert re.fullmatch(r"[a-z ]+ 0\.\d+ \(\d, 4, 4\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("command", re.findall(r"(?m)^gridcap (?:predict|attend|export) .*$", SHELL))
def test_commands_of_prediction_run(command: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "holiday/a.png"):
        shutil.copy(tiny.images / "00.png", tmp_path / name)
    (tmp_path / "results/metrics").mkdir(parents=True)
    shutil.copy(ROOT / "results/metrics/scores.json", tmp_path / "results/metrics/scores.json")
    (tmp_path / "weights").mkdir()
    shutil.copy(tiny.weights, tmp_path / "weights/resnet50.safetensors")
    for name in ("data/model", "my-captioner"):
        if name not in re.findall(r"--out (\S+)", command):
            shutil.copytree(tiny.model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)[1:]
    words = words[: words.index(">")] if ">" in words else words[: words.index("<")] if "<" in words else words
    result = CliRunner().invoke(app, words, input=(tmp_path / "photo.jpg").read_bytes())
    assert result.exit_code == 0, (result.output, result.exception)


def test_every_stage_with_a_device_takes_it_from_the_environment() -> None:
    assert "GRIDCAP_DEVICE" in README
    sources = {path.name: path.read_text() for path in (ROOT / "stages").glob("*.py")}
    with_device = {name: source for name, source in sources.items() if re.search(r"(?m)^    device: ", source)}
    assert with_device
    assert [name for name, source in with_device.items() if 'envvar="GRIDCAP_DEVICE"' not in source] == []


def named(pattern: str) -> set[str]:
    """What commands in the README's code name."""
    return set(re.findall(rf"(?m)(?:^|(?<=\s)){pattern}", CODE))


def git(*arguments: str) -> str:
    """What git answers; nothing where there is no repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def table_of_params(values: dict[str, Any]) -> str:
    assert values.keys() == SECTIONS.keys()
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, params_section in SECTIONS.items():
        schema = TypeAdapter(params_section).json_schema()
        lines += params_rows(schema, schema.get("$defs", {}), name, values[name])
    return "\n".join(lines)


def params_rows(schema: Form, forms: Form, above: str, values: Any, note: str = "") -> Iterator[str]:
    """Rows of one section, and of the sections, entries and forms within it; `values` None: no defaults."""
    for key, field in schema["properties"].items():
        name, value = f"{above}.{key}", None if values is None else values[key]
        inner = [form(reference, forms) for reference in references(field)]
        if "$ref" in field:
            yield from params_rows(inner[0], forms, name, value)
            continue
        default = "" if values is None else code(value) if not isinstance(value, list) else listed(value)
        if "const" not in field:
            meaning = " ".join(field["description"].split())
            yield f"| `{name}`{note} | {kind(field, forms)} | {default} | {meaning} |"
        for one in inner:
            by = one["properties"].get("by")
            yield from params_rows(one, forms, name if by else f"{name}[]", None, f" (by: {by['const']})" if by else "")


def listed(values: list[Any]) -> str:
    if all(isinstance(value, str) for value in values):
        return code(f"[{', '.join(values)}]")
    return f"{len(values)} files"


def references(field: Form) -> list[str]:
    """Names of the forms that a field's values, or their entries, may have."""
    found = [field["$ref"]] if "$ref" in field else []
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ()), *filter(None, [field.get("items")])):
        found += references(part)
    return found


def form(reference: str, forms: Form) -> Form:
    found: Form = forms[reference.rpartition("/")[2]]
    return found


def kind(field: Form, forms: Form) -> str:
    """What a field takes, in a phrase."""
    match field:
        case {"anyOf": choices}:
            return ", ".join(kind(choice, forms) for choice in choices)
        case {"oneOf": choices}:
            forms_by = [form(choice["$ref"], forms)["properties"]["by"]["const"] for choice in choices]
            return ", ".join(f"`{{by: {by}, ...}}`" for by in forms_by)
        case {"enum": choices}:
            return ", ".join(map(code, choices))
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "null"}:
            return "`null`"
    names = {"integer": "whole number", "number": "number", "string": "text", "array": "list"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[bound]:g}" for bound, sign in bounds.items() if bound in field]
    return " ".join(["path" if field.get("format") == "path" else names[field["type"]], ", ".join(limits)]).strip()


def code(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def stages(file: str) -> dict[str, Any]:
    found: dict[str, Any] = YAML(typ="safe").load(ROOT / file)["stages"]
    return found


def table_of_stages() -> str:
    folders = {name: path for entry in YAML(typ="safe").load(ROOT / "dvc.yaml")["vars"] for name, path in entry.items()}

    def listed(entries: list[Any]) -> str:
        paths = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
        named = [re.sub(r"\$\{([\w.]+)\}", lambda found: folders.get(found[1], found[1]), path) for path in paths]
        return ", ".join(f"`{path}`" for path in named)

    lines = ["| stage | what it makes | reads | writes | settings |", "| --- | --- | --- | --- | --- |"]
    for name, stage in stages("dvc.yaml").items():
        inputs = [path for path in stage["deps"] if not path.startswith(("pipeline/", "stages/"))]
        outputs = [*stage["outs"], *stage.get("metrics", [])]
        cells = [f"`{name}`", stage["desc"], listed(inputs), listed(outputs), listed(stage["params"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_results(scores: dict[str, Any], scenes: dict[str, Any]) -> str:
    subsets = ("seen", "held-out")
    rows = {
        "pictures": [str(scores["num_images"]), *(str(scores["subsets"][subset]["num_images"]) for subset in subsets)],
        **{
            name: [with_interval(scores, name), *(figure(scores["subsets"][one].get(name)) for one in subsets)]
            for name in SCORES
        },
        **{
            name: [figure(reach(part, *path)) for part in (scenes, *(scenes["subsets"][one] for one in subsets))]
            for name, path in SCENE_SCORES.items()
        },
    }
    lines = ["| | test | seen | held-out |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def reach(values: Any, *path: str) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values.get(path[-1])


def with_interval(scores: dict[str, Any], name: str) -> str:
    if name not in scores:
        return figure(None)
    low, high = scores["intervals"][name]
    return f"{figure(scores[name])} ({figure(low)} to {figure(high)})"


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
