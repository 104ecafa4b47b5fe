import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.captions.sources.dataset import DatasetParams
from pipeline.errors import UserError
from pipeline.params import MAX_INTEGER, load, read_yaml
from pipeline.presets import find_preset, use
from tests.command_line import gridcap, gridcap_process
from tests.defaults import committed
from tests.paths import ROOT

PARAMS = """\
# Settings
dataset:  # input
  format: coco
  root: data/scenes/rendered   # dataset folder
  images: images
  captions:
    - {file: captions_train.json, folder: ".", split: train}
  splits: null
  missing_images: error
  bad_images: error
  bad_captions: error    # strict

# --- the decoder ---
demo:
  rate: 1e-4   # learning rate
  seed:
  milestones:
  - 3
  - 5

  # early stopping
  stop: {patience: 3, metric: cider}
  note: "a: b"
"""

OVERLAY = """\
demo:
  rate: 2.5e-4
  stop:
    patience: 5
"""


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


@pytest.fixture
def real_params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(committed("params.yaml"))
    return path


def overlay(folder: Path, text: str) -> Path:
    path = folder / "overlay.yaml"
    path.write_text(text)
    return path


def test_mappings_are_merged_and_all_other_text_is_kept(params: Path) -> None:
    use(overlay(params.parent, OVERLAY), [], params)
    expected = PARAMS.replace("rate: 1e-4 ", "rate: 0.00025 ").replace("patience: 3", "patience: 5")
    assert params.read_text() == expected


@pytest.mark.parametrize(
    ("assignment", "old", "new"),
    [
        ("demo.rate=3e-4", "rate: 1e-4   #", "rate: 0.0003   #"),
        ("demo.seed=7", "seed:\n", "seed: 7\n"),
        ("demo.milestones=[1, 2]", "  - 3\n  - 5\n\n  # early", "   [1, 2]\n\n  # early"),
        ("demo.stop.metric='a, b: c'", "metric: cider", 'metric: "a, b: c"'),
        ("demo.stop={x: [1, null]}", "{patience: 3, metric: cider}", "{x: [1, null]}"),
        ("demo.note=", '"a: b"', "null"),
        ("demo.note='7'", '"a: b"', '"7"'),
        ("dataset.root=../a-b/c", "data/scenes/rendered   #", "../a-b/c   #"),
        ("dataset.root=a=b", "data/scenes/rendered   #", '"a=b"   #'),
    ],
)
def test_an_assignment_changes_only_its_value(params: Path, assignment: str, old: str, new: str) -> None:
    assert PARAMS.count(old) == 1
    use(overlay(params.parent, "demo: {rate: 1e-4}"), [assignment], params)
    assert params.read_text() == PARAMS.replace("1e-4", "0.0001").replace(old.replace("1e-4", "0.0001"), new)


TEXT = st.text(st.characters(categories=["L", "N", "P", "Zs"]), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@example([("rate", {"._": None})])
@given(st.lists(st.tuples(st.sampled_from(["rate", "seed", "milestones", "stop", "note"]), VALUES), max_size=4))
def test_assigned_values_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, object]]) -> None:
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_text(PARAMS)
    expected = read_yaml(path)
    expected["demo"] |= {"rate": 2.5e-4, "stop": {"patience": 5, "metric": "cider"}} | dict(values)
    assignments = [f"demo.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values]
    use(overlay(path.parent, OVERLAY), assignments, path)
    assert read_yaml(path) == expected
    assert "# --- the decoder ---" in path.read_text()


@pytest.mark.parametrize("name", ["scenes", "flickr8k", "coco"])
def test_the_dataset_section_is_replaced(real_params: Path, name: str) -> None:
    preset = ROOT / "presets" / f"{name}.yaml"
    before = real_params.read_text()
    use(preset, [], real_params)
    after = real_params.read_text()
    assert load(real_params, "dataset", DatasetParams) == load(preset, "dataset", DatasetParams)
    assert after.split("\n\nevaluate:")[1] == before.split("\n\nevaluate:")[1]
    assert after.split("\n\ndataset:")[0] == before.split("\n\ndataset:")[0]
    assert "dataset folder; a DVC dependency" not in after


@pytest.mark.slow
def test_the_last_preset_replaces_the_previous_ones(real_params: Path) -> None:
    use(ROOT / "presets" / "scenes.yaml", [], real_params)
    once = real_params.read_text()
    use(ROOT / "presets" / "coco.yaml", ["dataset.splits={by: seed, seed: 1, val: 0.1, test: 0.9}"], real_params)
    assert real_params.read_text() != once
    use(ROOT / "presets" / "scenes.yaml", [], real_params)
    assert real_params.read_text() == once


def test_the_default_params_are_the_scenes_preset(real_params: Path) -> None:
    before = read_yaml(real_params)
    use(ROOT / "presets" / "scenes.yaml", [], real_params)
    assert read_yaml(real_params) == before


@pytest.mark.parametrize(
    ("text", "assignment", "facts"),
    [
        ("demo: {rat: 1}", "demo.seed=1", ["overlay.yaml", "demo.rat", "rate"]),
        ("decoder: {x: 1}", "demo.seed=1", ["overlay.yaml", "decoder", "dataset, demo"]),
        ("demo: {rate: 1}", "demo.rate.x=1", ["'demo.rate.x=1'", "demo.rate.x"]),
        ("demo: {rate: 1}", "demo.seed", ["'demo.seed'", "KEY=VALUE"]),
        ("demo: {rate: 1}", "=1", ["'=1'", "KEY=VALUE"]),
        ("demo: {rate: 1}", "demo.seed=.nan", ["demo.seed", "nan"]),
        ("demo: {rate: 1}", "demo.seed=[1", ["'demo.seed=[1'", "YAML"]),
        ("demo: {rate: 1}", "dataset.format=voc", ["left unchanged", "dataset.format", "voc"]),
        ("dataset: {format: coco}", "demo.seed=1", ["left unchanged", "overlay.yaml", "dataset.root is missing"]),
        ("dataset: null", "demo.seed=1", ["left unchanged", "dataset"]),
        ("- 1", "demo.seed=1", ["overlay.yaml", "mapping"]),
        ("demo: {rate: 2024-05-01}", "demo.seed=1", ["overlay.yaml", "demo.rate", "date"]),
        ("demo: {rate: 1}", "demo.seed=2024-05-01", ["'demo.seed=2024-05-01'", "demo.seed", "date"]),
        ("demo: &demo {rate: *demo}", "demo.seed=1", ["overlay.yaml", "demo.rate", "itself"]),
        ("demo: {rate: 1}", f"demo.seed={'[' * 600}", ["'demo.seed=[[", "demo.seed", "nested"]),
        ("demo: {rate: 1}", f"demo.seed={'9' * 5000}", ["'demo.seed=99", "demo.seed", "digits"]),
    ],
)
def test_an_invalid_change_leaves_the_file_unchanged(
    params: Path, text: str, assignment: str, facts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        use(overlay(params.parent, text), [assignment], params)
    assert [fact for fact in facts if fact not in str(caught.value)] == []
    assert params.read_text() == PARAMS


def test_presets_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    custom = overlay(tmp_path, OVERLAY)
    assert find_preset(str(custom), ROOT / "presets") == custom
    assert find_preset("coco", ROOT / "presets") == ROOT / "presets" / "coco.yaml"
    with pytest.raises(UserError) as caught:
        find_preset("flickr9k", ROOT / "presets")
    assert "flickr9k.yaml" in str(caught.value)
    assert "coco, flickr8k, scenes" in str(caught.value)


def test_the_command_applies_preset_and_assignments(real_params: Path) -> None:
    (real_params.parent / "presets").symlink_to(ROOT / "presets")
    result = gridcap("use", "flickr8k", "dataset.root=../shared/real/flickr", "--params", real_params)
    assert result.exit_code == 0, result.output
    assert read_yaml(real_params)["dataset"]["root"] == "../shared/real/flickr"
    assert "flickr8k.yaml" in result.output


@pytest.mark.slow
def test_the_command_reports_an_error_without_a_traceback(params: Path) -> None:
    result = gridcap_process("use", "nothing", "--params", params)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nothing.yaml: no such preset" in result.stderr
