"""The rules of the house: who may import whom, and a graph in dvc.yaml that tells the truth about the code."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
DVC_FILES = ("dvc.yaml", "data/scenes/dvc.yaml")

# What each part of the library may import besides itself and the ground floor.
MAY_IMPORT = {
    "app": {"captions.records", "decoder.saved", "decoder.search", "features.images", "prediction", "scenes"},
    "captions": set(),
    "features": {"captions.records"},
    "decoder": {"captions.records", "captions.tokens", "captions.vocabulary", "features.store"},
    "evaluation": {"captions", "decoder", "features", "scenes.judge"},
    "prediction": {"captions.vocabulary", "decoder", "evaluation.plots", "features"},
    "scenes": {"captions.records", "features.encoder", "features.images"},
}
GROUND_FLOOR = {f"pipeline.{name}" for name in ("device", "errors", "hdf5", "params", "publish", "ranks")} | {
    "pipeline"
}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the project that a module names in any import, also inside functions."""
    named = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return frozenset(named & MODULES.keys())


def reached(module: str) -> set[str]:
    """Modules whose code a module runs; packages that only hold a docstring do not count."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports(name)
    return {name for name in seen if len(ast.parse(MODULES[name].read_text()).body) > 1}


def stages() -> dict[str, dict[str, Any]]:
    found = {}
    for file in DVC_FILES:
        for name, stage in YAML(typ="safe").load(ROOT / file)["stages"].items():
            found[f"{file}:{name}"] = stage
    return found


STAGES = stages()


def module_of(stage: dict[str, Any]) -> str:
    words = stage["cmd"].split()
    return str(words[words.index("-m") + 1])


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_exactly_the_modules_it_imports(name: str) -> None:
    stage = STAGES[name]
    listed: set[Path] = set()
    for dependency in stage["deps"]:
        path = ROOT / dependency
        if dependency.startswith(("pipeline/", "stages/")):
            assert path.exists(), f"{name} depends on {dependency}, which is not there"
            listed |= set(path.rglob("*.py")) if path.is_dir() else {path}
    needed = {MODULES[module] for module in reached(module_of(stage))}
    docstrings_alone = {path for path in listed if len(ast.parse(path.read_text()).body) == 1}
    assert sorted(map(str, needed - listed)) == []
    assert sorted(map(str, listed - needed - docstrings_alone)) == []


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_names_exactly_the_sections_it_reads(name: str) -> None:
    stage = STAGES[name]
    read = set()
    for node in ast.walk(ast.parse(MODULES[module_of(stage)].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load":
            assert isinstance(node.args[1], ast.Constant)
            read.add(node.args[1].value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "read_yaml":
            read |= YAML(typ="safe").load(ROOT / "params.yaml").keys()
    named: set[str] = set()
    for entry in stage["params"]:
        named |= {entry} if isinstance(entry, str) else {key for keys in entry.values() for key in keys}
    assert named == read


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") >= 2])
def test_imports_follow_the_data_from_left_to_right(module: str) -> None:
    part = module.split(".")[1]
    for imported in imports(module) - GROUND_FLOOR:
        other = imported.removeprefix("pipeline.")
        allowed = MAY_IMPORT[part] | {part}
        assert any(other == name or other.startswith(f"{name}.") or name.startswith(f"{other}.") for name in allowed), (
            f"{module} imports {imported}"
        )


def test_the_library_imports_no_stage() -> None:
    assert [name for name in MODULES if name.startswith("pipeline") and any("stages" in i for i in imports(name))] == []


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("stages.")))
def test_a_stage_is_short_and_has_no_loop(module: str) -> None:
    source = MODULES[module].read_text()
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For | ast.While)]
    assert loops == []
    assert len(source.splitlines()) <= 65


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("stages.")))
def test_every_flag_of_a_stage_is_documented(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Option":
            assert any(keyword.arg == "help" for keyword in node.keywords), f"{module}, line {node.lineno}"


def test_the_help_of_gridcap_loads_neither_torch_nor_spacy() -> None:
    program = (
        "import sys, pipeline.cli, pipeline.presets, pipeline.inspection\n"
        "print([name for name in ('torch', 'spacy', 'matplotlib') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"
