import json
from pathlib import Path
from typing import Any

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

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))

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
        ("demo.note=[{x: 1}, {y: 2}]", '"a: b"', "[\n    {x: 1},\n    {y: 2}]"),
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


@pytest.mark.parametrize("name", PRESETS)
def test_the_dataset_section_is_replaced(real_params: Path, name: str) -> None:
    preset = ROOT / "presets" / f"{name}.yaml"
    before = real_params.read_text()
    use(preset, [], real_params)
    after = real_params.read_text()
    dataset = next(path for path in lineage(preset) if "dataset" in read_yaml(path))
    assert load(real_params, "dataset", DatasetParams) == load(dataset, "dataset", DatasetParams)
    assert (
        after.split("\n\nevaluate:")[1].split("published:")[0]
        == before.split("\n\nevaluate:")[1].split("published:")[0]
    )
    assert after.split("\n\ndataset:")[0] == before.split("\n\ndataset:")[0]
    assert "dataset folder; a DVC dependency" not in after


def lineage(preset: Path) -> list[Path]:
    """Return a preset and its bases, the last of which has none."""
    base = read_yaml(preset).get("base")
    return [preset, *([] if base is None else lineage(preset.with_name(f"{base}.yaml")))]


def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted keys of a preset, without section `dataset`."""
    keys = set()
    for key, value in values.items():
        if key not in ("base", "dataset"):
            keys |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return keys


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "nocaps"])
def test_every_preset_sets_the_same_keys(name: str) -> None:
    expected = leaves(read_yaml(ROOT / "presets/scenes.yaml"))
    keys = set().union(*(leaves(read_yaml(path)) for path in lineage(ROOT / f"presets/{name}.yaml")))
    assert keys == expected  # so nothing of a previous preset remains


def test_a_preset_adds_to_its_base(real_params: Path) -> None:
    use(ROOT / "presets/coco-karpathy-topdown-scst.yaml", ["train.max_epochs=2"], real_params)
    params = read_yaml(real_params)
    assert params["dataset"]["format"] == "karpathy"  # of coco-karpathy-sat
    assert params["encode"]["architecture"] == "resnet101"  # of coco
    assert (params["train"]["decoder"]["kind"], params["train"]["lr"]["peak"]) == ("top_down", 5e-4)
    assert (params["train"]["max_epochs"], params["refine"]["max_epochs"]) == (2, 20)
    assert [row["scores"]["CIDEr-D"] for row in params["evaluate"]["published"]] == [1.201, 1.227, 1.239, 1.247]
    text = real_params.read_text()
    use(ROOT / "presets/coco.yaml", [], real_params)
    assert read_yaml(real_params)["evaluate"]["published"] == []
    use(ROOT / "presets/coco-karpathy-topdown-scst.yaml", ["train.max_epochs=2"], real_params)
    assert real_params.read_text() == text


@pytest.mark.parametrize(
    ("bases", "fault"),
    [
        ({"a": "b", "b": "a"}, r"a\.yaml: base: the preset is based on itself"),
        ({"a": "c"}, r"c\.yaml: no such preset. Use one of a, or a YAML file"),
        ({"a": "[b]"}, r"a\.yaml: base must be a valid string"),
    ],
)
def test_an_invalid_base_leaves_the_file_unchanged(params: Path, bases: dict[str, str], fault: str) -> None:
    folder = params.parent / "presets"
    folder.mkdir()
    for name, base in bases.items():
        (folder / f"{name}.yaml").write_text(f"base: {base}\ndemo: {{rate: 1}}\n")
    with pytest.raises(UserError, match=fault):
        use(folder / "a.yaml", [], params)
    assert params.read_text() == PARAMS


PUBLISHED = {"system": "a", "source": "b", "data": "c", "notes": None}


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        ({"BLEU-4": 19.5}, "BLEU-4 must be <= 1, not in points, got 19.5"),
        ({"CIDEr-D": 113}, "CIDEr-D must be <= 10, not in points, got 113"),
        ({"CIDEr-D": -1}, "evaluate.published.0.scores.CIDEr-D must be greater than or equal to 0"),
        ({"BLEU": 0.1}, "scores has the unknown metric 'BLEU'. Valid metrics: BLEU-1, "),
    ],
)
def test_published_scores_have_the_metrics_and_units_of_scores_json(
    real_params: Path, scores: dict[str, float], fault: str
) -> None:
    with pytest.raises(UserError) as caught:
        use(
            ROOT / "presets/scenes.yaml",
            [f"evaluate.published={json.dumps([PUBLISHED | {'scores': scores}])}"],
            real_params,
        )
    assert fault in str(caught.value)


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
    assert f"Use one of {', '.join(PRESETS)}, or a YAML file." in str(caught.value)


def test_the_command_applies_preset_and_assignments(real_params: Path) -> None:
    (real_params.parent / "presets").symlink_to(ROOT / "presets")
    result = gridcap("use", "flickr8k", "dataset.root=../shared/real/flickr", "--params", real_params)
    assert result.exit_code == 0, result.output
    assert read_yaml(real_params)["dataset"]["root"] == "../shared/real/flickr"
    assert "data/weights/resnet50-11ad3fa6.pth: no such file. Run `gridcap download weights:resnet50`." in result.output
    assert "flickr8k.yaml" in result.output


@pytest.mark.slow
def test_the_command_reports_an_error_without_a_traceback(params: Path) -> None:
    result = gridcap_process("use", "nothing", "--params", params)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "nothing.yaml: no such preset" in result.stderr
