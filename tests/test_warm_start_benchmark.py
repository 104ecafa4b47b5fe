"""The benchmark of warm starts without real images: folds of the scenes, the table, and missing folders."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.crossvalidation import score
from benchmarks.warm_start import main, read_scenes, table
from pipeline.captions.records import SPLITS, AnnotatedObject, Record, write_records
from tests.factories import small_spec
from tests.feature_stores import write_store
from tests.paths import ROOT


def scene(image_id: int, color: str) -> Record:
    """Return a scene of one object; splits take turns."""
    scene_object = AnnotatedObject(attributes={"shape": "cube", "color": color}, box=(0.1, 0.2, 0.3, 0.4))
    return Record(
        image_id=image_id,
        file=f"{image_id}.jpg",
        split=SPLITS[image_id % 3],
        captions=(f"a {color} cube",),
        objects=(scene_object,),
    )


def test_the_initial_model_sees_no_scene_with_a_new_color_and_the_others_see_only_those(tmp_path: Path) -> None:
    records = [scene(index, ["red", "yellow", "purple", "blue"][index // 3 % 4]) for index in range(48)]
    write_records(tmp_path / "prepared", records)
    spec = small_spec()
    grids = np.zeros((len(records), *spec.grid_shape), dtype=np.float16)
    write_store(tmp_path / "features", spec, range(len(records)), grids)
    images, start, (fold,) = read_scenes(tmp_path, ROOT / "params.yaml", num_scenes=5)
    by_id = {record.image_id: record for record in records}
    colors = {name: {by_id[i].objects[0].attributes["color"] for i in ids} for name, ids in vars(start).items()}
    assert colors == {"train": {"red", "blue"}, "val": {"red", "blue"}, "test": {"yellow", "purple"}}
    assert {by_id[i].objects[0].attributes["color"] for i in fold.train + fold.val} == {"yellow", "purple"}
    assert len(fold.train) == 5
    assert fold.test == start.test
    for part, split in (("train", "train"), ("val", "val"), ("test", "test")):
        assert {by_id[i].split for i in getattr(fold, part)} == {split}
    assert set(images.records) == set(by_id)


def test_the_table_has_a_difference_for_each_seed() -> None:
    references = {index: [[*"abcdefg"[index:], "end"]] for index in range(4)}
    good = {index: captions[0] for index, captions in references.items()}
    bad = {index: ["a", "b", "c", "d"] for index in references}
    lines = table({"start": score(bad, references), "anew, seed 1": score(bad, references)} | {
        "continued, seed 1": score(good, references)
    }, num_seeds=1)  # fmt: skip
    (difference,) = [line for line in lines if line.strip().startswith("continued - anew")]
    assert difference.split()[5].startswith("+")
    assert len(lines) == 5


def test_missing_folders_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--real", str(tmp_path / "absent"), "--data", str(tmp_path)])
    output = capsys.readouterr().out.splitlines()
    assert output == [
        f"photographs: skipped: {tmp_path}/absent: no such folder.",
        f"scenes: skipped: {tmp_path}/features: no such folder.",
    ]
