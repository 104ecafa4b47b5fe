"""README and docs: generated parts are up to date, links resolve, commands and code run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from ruamel.yaml import YAML
from typer.main import get_command
from typer.testing import CliRunner

from docs.generate import CONFIGURATION, configuration_page, read_metrics, readme
from pipeline.cli import app
from pipeline.features.store import write_index, write_shard
from pipeline.generation.ensemble import caption_grids, precompute
from pipeline.generation.search import SearchParams
from pipeline.import_graph import modules
from pipeline.params import check, read_yaml
from pipeline.presets import SECTIONS, find_preset, section_class, use
from pipeline.training.loss import caption_loss
from tests.defaults import ROOT, committed
from tests.factories import decoder_params, small_spec
from tests.kinds import SIDE, C, V, example_batch
from tests.tiny_captioner import Tiny

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
README = TEXTS[ROOT / "README.md"]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
SHELL = "\n".join(
    block.replace("\\\n", " ")
    for text in TEXTS.values()
    for language, block in BLOCK.findall(text)
    if language in ("sh", "console")
)
CODE = SHELL + "\n" + "\n".join(span for text in TEXTS.values() for span in re.findall(r"`([^`\n]+)`", text))
DECODER_SECTION = TEXTS[ROOT / "CONTRIBUTING.md"].split("## Add a decoder")[1]
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def find_in_code(pattern: str) -> set[str]:
    """Return the matches of a pattern at the beginning of words in commands and code of all pages."""
    return set(re.findall(rf"(?m)(?:^|(?<=\s)){pattern}", CODE))


def test_readme_is_a_front_page() -> None:
    assert len(README.splitlines()) <= 200


def test_the_configuration_page_is_up_to_date() -> None:
    defaults = YAML(typ="safe", pure=True).load(committed("params.yaml"))
    pages = [configuration_page(values) for values in (defaults, read_yaml(ROOT / "params.yaml"))]
    assert CONFIGURATION.read_text() in pages, "run `make docs`"


def test_the_generated_parts_of_readme_are_up_to_date(tmp_path: Path) -> None:
    # Results in the working tree may be those of another machine or of other settings.
    for name in ("scores", "scenes"):
        (tmp_path / f"{name}.json").write_text(committed(f"results/metrics/{name}.json"))
    assert readme(README, read_metrics(tmp_path)) == README, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", BLOCK.sub("", target.read_text()))
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_no_placeholders_and_short_lines(page: Path) -> None:
    assert re.findall(r"TODO|\{\{.*?\}\}|[A-Z]+_OUTPUT|BENCH_TABLES", TEXTS[page]) == []
    prose = [line for line in BLOCK.sub("", TEXTS[page]).splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 120] == []


def test_every_page_is_linked_from_the_front_page() -> None:
    linked = set(re.findall(r"\((docs/\w+\.md)\)", README))
    assert linked == {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"}


def test_the_layout_in_readme_is_that_of_the_repository() -> None:
    (layout,) = (block for language, block in BLOCK.findall(README) if block.startswith("gridcap.py"))
    packages = {path.parent.name for path in ROOT.glob("pipeline/*/__init__.py")}
    assert set(re.findall(r"(?m)^  (\w+)/", layout)) == packages
    assert [name for name in re.findall(r"(?m)^(\w+)/", layout) if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_functions_that_pages_name_exist(page: Path) -> None:
    for path, name in re.findall(r"`((?:pipeline|stages)/[a-z0-9_/]+\.py)(?::(\w+))?`", TEXTS[page]):
        assert (ROOT / path).is_file(), path
        if name:
            assert re.search(rf"(?m)^\s*(?:def|class) {name}\b", (ROOT / path).read_text()), f"{path}:{name}"


def test_commands_exist() -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text()))
    assert {"repro", "test", "check"} <= find_in_code(r"(?:\$ )?make ([\w-]+)") <= targets
    assert find_in_code(r"(?:\$ )?gridcap (\w[\w-]*)") <= COMMANDS.keys()
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert find_in_code(r"dvc repro (?:-\w+ )*([a-z][\w-]*)") <= stages.keys()
    assert {f"stages.{name}" for name in find_in_code(r"-m stages\.(\w+)")} <= modules().keys()


def test_flags_of_gridcap_exist() -> None:
    for line in re.findall(r"(?m)^(?:\$ )?gridcap (.*)$", SHELL):
        command, *words = shlex.split(line, comments=True)
        valid_flags = {flag for param in COMMANDS[command].params for flag in (*param.opts, *param.secondary_opts)}
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= {*valid_flags, "--help"}, line


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(find_in_code(r"-m (stages\.\w+)")))
def test_flags_of_stages_exist(stage: str) -> None:
    command = [sys.executable, "-m", stage, "--help"]
    help_text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in SHELL.splitlines():
        if f"-m {stage} " in line:
            flags = re.findall(r"--[\w-]+", line.partition(f"-m {stage} ")[2])
            assert [flag for flag in flags if flag not in help_text] == [], line


def test_settings_of_experiments_exist(tmp_path: Path) -> None:
    settings = {setting.partition(",")[0] for setting in find_in_code(r"(?:-S|--set-param) '?([\w.]+=[^\s']+)")}
    assert settings
    path = tmp_path / "params.yaml"
    path.write_text(committed("params.yaml"))
    use(ROOT / "presets/scenes.yaml", sorted(settings), path)


def test_the_table_of_presets_has_all_presets() -> None:
    rows = re.findall(
        r"(?m)^\| `([\w-]+)` \|.*\| (.*) \|$", TEXTS[ROOT / "docs/datasets.md"].split("### Published scores")[0]
    )
    presets = {path.stem: read_yaml(path) for path in (ROOT / "presets").glob("*.yaml")}
    assert dict(rows).keys() == presets.keys()
    # The table names the paper of each list of published scores, which no preset inherits.
    for name, published in rows:
        sources = {row["source"].partition(",")[0] for row in presets[name].get("evaluate", {}).get("published", [])}
        assert {source for source in sources if " et al. " in source} == set(re.findall(r"\w+ et al\. \d+", published))


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?m)^gridcap use .*$", SHELL))))
def test_commands_with_presets_give_valid_params(command: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(committed("params.yaml"))
    _, _, preset, *assignments = shlex.split(command, comments=True)
    if preset.isupper():
        pytest.skip("a placeholder")
    use(find_preset(preset, ROOT / "presets"), assignments, path)
    written = read_yaml(path)
    for name in SECTIONS:
        check(written[name], name, section_class(name), command)


def test_the_hdf5_example_reads_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (block for language, block in BLOCK.findall(README) if language == "python" and "h5py" in block)
    folder = tmp_path / "data/features"
    spec = small_spec()
    grids = np.arange(24, dtype=np.float16).reshape(2, 4, 3)
    shard = write_shard(folder, spec, [5, 1_000_000], [("a" * 64, "whole"), ("b" * 64, "whole")], grids)
    write_index(folder, spec, ("whole",), [shard], {5: "a" * 64, 1_000_000: "b" * 64})
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(block, variables)
    assert np.array_equal(variables["grid"], grids[1])


@pytest.mark.slow
def test_the_python_example_captions_an_image(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (block for language, block in BLOCK.findall(README) if language == "python" and "Captioner" in block)
    shutil.copytree(tiny.model, tmp_path / "data/model")
    shutil.copy(tiny.images / "00.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert re.fullmatch(r"[a-z ]+ 0\.\d+ \(\d, 4, 4\)\n", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?m)^gridcap (?:predict|export) .*$", SHELL))))
def test_predict_and_export_commands_run(
    command: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("photo.jpg", "holiday/a.png", "data/nocaps/images/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
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


def decoder_modules() -> dict[str, str]:
    """Return the code of the decoder of the contributing guide, by module."""
    blocks = [block for language, block in BLOCK.findall(DECODER_SECTION) if language == "python"]
    return dict(zip(("gru", "gru_reference"), blocks, strict=True))


@pytest.mark.exhaustive
def test_the_decoder_of_the_contributing_guide_passes_the_tests_of_every_kind(tmp_path: Path) -> None:
    for name in ("pipeline", "stages", "benchmarks", "tests", "presets", "data/scenes", "data/ensemble"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "rendered"))
    for name in ("gridcap.py", "pyproject.toml", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    decoders = tmp_path / "pipeline/decoder"
    for name, block in decoder_modules().items():
        (decoders / f"{name}.py").write_text(block)
    for name, old, new in (
        ("decoder.py", '"adaptive"]', '"adaptive", "gru"]'),
        ("registry.py", "\n\n", "\nfrom pipeline.decoder.gru import GRUDecoder\n\n"),
        ("registry.py", '"adaptive": AdaptiveDecoder', '"gru": GRUDecoder, "adaptive": AdaptiveDecoder'),
        ("references.py", "\n\n", "\nfrom pipeline.decoder.gru_reference import GRUReference\n\n"),
        ("references.py", '"adaptive": AdaptiveReference', '"gru": GRUReference, "adaptive": AdaptiveReference'),
    ):
        text = (decoders / name).read_text()
        assert old in text
        (decoders / name).write_text(text.replace(old, new, 1))
    files = [path for path in (tmp_path / "tests").glob("test_*.py") if "\n@all_kinds" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-k", "gru", "-m", "not gpu", *map(str, files)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.findall(r"(\d+) passed", run.stdout)[0]) > 40


def test_the_decoder_of_the_contributing_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two code blocks, as modules: equal to each other, and usable in training and search."""
    assert len(DECODER_SECTION.splitlines()) < 150
    for name, block in decoder_modules().items():
        module = ModuleType(f"pipeline.decoder.{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(block, name, "exec"), module.__dict__)
    torch.manual_seed(0)
    decoder = sys.modules["pipeline.decoder.gru"].GRUDecoder(decoder_params(), (SIDE, SIDE), C, V).double()
    reference = sys.modules["pipeline.decoder.gru_reference"].GRUReference(decoder)
    grids, tokens = example_batch()
    losses = [caption_loss(*model(grids, tokens), tokens) for model in (decoder, reference)]
    for loss in losses:
        loss.total(loss.counts, 0.5).backward()
    torch.testing.assert_close(losses[0].cross_entropy, losses[1].cross_entropy, rtol=1e-10, atol=0)
    gradients = reference.convert_weights({name: parameter.grad for name, parameter in decoder.named_parameters()})
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-13)
    search = replace(SearchParams.greedy(4), beam_size=3)
    words = [f"word{token}" for token in range(V)]
    captions = caption_grids([decoder.eval()], words, grids, range(len(grids)), search, precompute([decoder], search))
    assert all(caption.words for (caption,) in captions)
