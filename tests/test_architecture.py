"""The architecture: which package may import which, and a dvc.yaml that agrees with the code."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from ruamel.yaml import YAML

from pipeline.decoder.decoder import DecoderKind
from pipeline.import_graph import DVC_FILES, ROOT, imports, modules, stage_module
from tests.imports import imported_packages

# The order of the data: a package imports only itself, the base modules and packages before it in this list.
ORDER = [
    "captions",
    "features",
    "metrics",
    "decoder",
    "generation",
    "training",
    "evaluation",
    "report",
    "prediction",
    "app",
]
# The embedded dataset is outside the order: it trains an encoder, and evaluation uses its annotations.
SCENES_MAY_IMPORT = {"captions", "features"}
MAY_IMPORT_SCENES = {"evaluation", "app"}
BASE_MODULES = {
    "pipeline",
    *(
        f"pipeline.{name}"
        for name in (
            "artifacts",
            "cuda_graphs",
            "device",
            "distributed",
            "downloads",
            "errors",
            "hdf5",
            "import_graph",
            "params",
            "startup",
        )
    ),
}
MODULES = modules()
STAGE_MODULES = sorted(name for name in MODULES if name.startswith("stages."))


def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def package(module: str) -> str:
    return module.split(".")[1]


def stages() -> dict[str, dict[str, Any]]:
    return {
        f"{file}:{name}": stage
        for file in DVC_FILES
        for name, stage in YAML(typ="safe").load(ROOT / file)["stages"].items()
    }


STAGES = stages()


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".") >= 2])
def test_imports_follow_the_order_of_the_data(module: str) -> None:
    importer = package(module)
    if importer == "scenes":
        allowed = SCENES_MAY_IMPORT | {"scenes"}
    else:
        allowed = {*ORDER[: ORDER.index(importer) + 1]} | ({"scenes"} if importer in MAY_IMPORT_SCENES else set())
    imported = {name for name in imports(module) - BASE_MODULES if name.startswith("pipeline.")}
    assert sorted(name for name in imported if package(name) not in allowed) == []


@pytest.mark.parametrize("module", sorted(BASE_MODULES))
def test_base_modules_import_only_each_other(module: str) -> None:
    assert sorted(imports(module) - BASE_MODULES) == []


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_every_number_that_a_stage_takes_is_bounded(module: str) -> None:
    hints = get_type_hints(importlib.import_module(module).main, include_extras=True)
    numbers = {name: get_args(hint) for name, hint in hints.items() if get_args(hint)[:1] in ((int,), (float,))}
    # NaN is within all bounds of a float.
    assert [name for name, (number, option) in numbers.items() if number is float or option.max is None] == []


def test_the_library_imports_no_stage() -> None:
    importing = [name for name in MODULES if name.startswith("pipeline") and any("stages" in i for i in imports(name))]
    assert importing == []


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_params_that_it_reads(name: str) -> None:
    read = set()
    for node in ast.walk(parse(stage_module(STAGES[name]["cmd"]))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ("load", "load_key"):
            assert isinstance(node.args[1], ast.Constant)
            read.add(node.args[1].value)
        if node.func.id == "read_yaml":
            read |= YAML(typ="safe").load(ROOT / "params.yaml").keys()
    # A section includes its keys.
    read = {key for key in read if key.partition(".")[0] not in read - {key}}
    declared: set[str] = set()
    for entry in STAGES[name]["params"]:
        declared |= {entry} if isinstance(entry, str) else {key for keys in entry.values() for key in keys}
    assert declared == read


@pytest.mark.parametrize("name", STAGES)
def test_no_param_passes_through_a_shell(name: str) -> None:
    sections = YAML(typ="safe").load(ROOT / "params.yaml").keys()
    used = {match[1] for match in re.finditer(r"\$\{(\w+)[.}]", STAGES[name]["cmd"])}
    assert used & sections == set()


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_a_stage_is_short_and_has_no_loop(module: str) -> None:
    loops = [node for node in ast.walk(parse(module)) if isinstance(node, ast.For | ast.While)]
    assert loops == []
    assert len(MODULES[module].read_text().splitlines()) <= 65


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_every_flag_of_a_stage_is_documented(module: str) -> None:
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "Option":
            assert any(keyword.arg == "help" for keyword in node.keywords), f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_every_stage_with_a_device_has_the_shared_option(module: str) -> None:
    source = MODULES[module].read_text()
    assert ("    device: " in source) == ("    device: DeviceOption" in source)


@pytest.mark.parametrize("module", STAGE_MODULES)
def test_the_help_of_a_stage_imports_no_heavy_package(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert imported & {"torch", "numpy", "h5py", "PIL", "spacy", "matplotlib", "pycocotools", "dvc"} == set()


def test_every_module_has_a_test_file_of_its_name() -> None:
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    if "app_page" in tests:  # tests all pages of the app in a browser
        tests |= {"captioning", "models", "app_training"}
    if "decoder_reference" in tests:  # tests the reference of every kind of decoder
        tests |= {f"{kind}_reference" for kind in get_args(DecoderKind)}
    stems = {name: name.rpartition(".")[2] for name in modules_with_code() if name.startswith("pipeline.")}
    untested = [
        name for name, stem in sorted(stems.items()) if stem not in tests and f"{package(name)}_{stem}" not in tests
    ]
    assert untested == []


def modules_with_code() -> set[str]:
    """Return the modules, other than packages, that define a function or a class."""
    return {
        name
        for name, path in MODULES.items()
        if path.name != "__init__.py"
        and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in parse(name).body)
    }


def test_the_command_line_imports_no_heavy_package() -> None:
    heavy = ["torch", "numpy", "h5py", "spacy", "dvc", "matplotlib", "pydantic"]
    assert imported_packages("import gridcap, pipeline.cli", heavy) == []


def test_top_level_files_exist() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt"):
        assert Path(ROOT, name).is_file(), name
