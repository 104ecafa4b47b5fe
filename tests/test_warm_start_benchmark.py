"""The benchmark of warm starts without real images: folds of the scenes, and missing folders."""

from pathlib import Path

import pytest

from benchmarks import warm_start
from pipeline.captions.records import SPLITS, AnnotatedObject, Record, write_records


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


def test_the_initial_model_sees_no_scene_with_a_new_color_and_the_others_see_only_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [scene(index, ["red", "yellow", "purple", "blue"][index // 3 % 4]) for index in range(48)]
    write_records(tmp_path / "prepared", records)
    for record in records:
        path = tmp_path / "scenes/rendered/images" / record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(warm_start, "NUM_SCENES", 5)
    task = warm_start.read_scenes(tmp_path, tmp_path / "work")
    start, (fold,) = task.start, task.folds
    by_id = {record.image_id: record for record in records}
    colors = {name: {by_id[i].objects[0].attributes["color"] for i in ids} for name, ids in vars(start).items()}
    assert colors == {"train": {"red", "blue"}, "val": {"red", "blue"}, "test": {"yellow", "purple"}}
    assert {by_id[i].objects[0].attributes["color"] for i in fold.train + fold.val} == {"yellow", "purple"}
    assert len(fold.train) == 5
    assert fold.test == start.test
    for part, split in (("train", "train"), ("val", "val"), ("test", "test")):
        assert {by_id[i].split for i in getattr(fold, part)} == {split}
    assert set(task.images.records) == {*start.train_and_val, *start.test, *fold.train_and_val}


def test_missing_folders_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm_start.main(["--real", str(tmp_path / "absent"), "--data", str(tmp_path)])
    output = capsys.readouterr().out.splitlines()
    assert output == [
        f"photographs: skipped: {tmp_path}/absent: no such folder.",
        f"scenes: skipped: {tmp_path}/prepared: no such folder.",
    ]
