"""Warm start (`train.start_from`) compared with training anew, on photographs and on scenes.

photographs: a model of the Flickr8k photographs in `--real` is continued on 60 of the 80 COCO photographs there, four
times, so that each COCO photograph is captioned once by a model that was not trained on it. 20 photographs a fold and
80 in all are few: read the intervals.

scenes: a model of the scenes without a yellow or purple object is continued on 100 of those with one, and scored on the
test scenes with one. `objects` is the fraction of captions whose objects are all correct. The encoder has seen all
colors.

System `start` is the model that `continued` starts from, `anew` has the same images, settings and number of steps as
`continued`, and `anew_longer` five times as many. These three have a shorter warm-up and more epochs than `start`, to
suit their few images. Intervals are 95%, by bootstrap over images, paired for differences.
The folder `--real` is that of `benchmarks.crossvalidation` with `coco/images` and
`coco/captions_train2017_sample.json`; the scenes are those of `dvc repro prepare`. Features, models and captions are
kept in the work folder: an interrupted run resumes.
"""

# Sets environment variables that PyTorch reads when it is imported.
import stages  # noqa: F401

# isort: split
import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.crossvalidation.folds import Fold, ImageSet, assign_folds, make_image_set
from benchmarks.crossvalidation.systems import (
    INTERVALS,
    ROOT,
    Experiment,
    caption_fold,
    gridcap_system,
    write_params,
)
from benchmarks.crossvalidation.table import (
    DIFFERENCE_HEAD,
    SCORE_HEAD,
    Row,
    SystemScores,
    add_means,
    difference_lines,
    score,
    score_lines,
)
from pipeline.captions.records import Record, Split, read_records
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.metrics.corpus import Words
from pipeline.params import check, load
from pipeline.presets import find_preset, use
from pipeline.scenes.caption_checker import names_correctly
from pipeline.training.train import TrainPaths, train
from pipeline.training.trainer import TrainParams

NEW_COLORS = {"yellow", "purple"}
NUM_SCENES = 100
NUM_FOLDS = 4
FEW_STEPS_SETTING = "train.lr.warmup_steps=10"
"""Change to the settings of the initial model for those trained on few images."""
NUM_EPOCHS = 20
"""Epochs of `anew` and `continued`."""
LONGER = 5
"""Epochs of `anew_longer`, divided by those of `anew` and `continued`."""
PHOTOGRAPH_SETTINGS = (
    "encode.views=[whole]",
    "train.random_views=false",
    "train.decoder.embedding_size=128",
    "train.decoder.hidden_size=256",
    "train.decoder.attention_size=128",
    "train.max_epochs=12",
    "train.precision=float32",
    "train.compile=false",
)
"""Changes to the settings of `benchmarks.crossvalidation`, which take less time."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A dataset to start from, and one to continue on."""

    images: ImageSet
    params: Path
    """Params file of the initial model."""
    start: Fold
    """Fold of the initial model, which tests all test images of `folds`."""
    folds: Sequence[Fold]
    """Folds of the models that are continued and trained anew."""


def read_photographs(real: Path, work: Path) -> Task:
    """Read the photographs. The validation photographs are always those of Flickr8k."""
    flickr = _read_records(real / "flickr", "flickr8k", "captions.txt", {"by": "json", "file": "splits.json"})
    # The splits are required, and not used.
    coco = _read_records(
        real / "coco", "coco", "captions_train2017_sample.json", {"by": "seed", "seed": 0, "val": 0.1, "test": 0.1}
    )
    # Ids of the two datasets may be equal.
    records = [replace(record, image_id=image_id) for image_id, record in enumerate([*flickr, *coco])]
    params = write_params(real, work, PHOTOGRAPH_SETTINGS)
    ids = {split: tuple(r.image_id for r in records[: len(flickr)] if r.split == split) for split in ("train", "val")}
    coco_ids = tuple(record.image_id for record in records[len(flickr) :])
    return Task(
        images=make_image_set(records, real, load(params, "tokenize", TokenizeParams)),
        params=params,
        start=Fold(train=ids["train"], val=ids["val"], test=coco_ids),
        folds=[
            Fold(train=fold.train_and_val, val=ids["val"], test=fold.test) for fold in assign_folds(coco_ids, NUM_FOLDS)
        ],
    )


def _read_records(root: Path, dataset_format: str, captions: str, splits: Mapping[str, Any]) -> list[Record]:
    """Read the records of a dataset in a subfolder of the folder of all images."""
    dataset = {
        "format": dataset_format,
        "root": str(root),
        "images": "images",
        "captions": [{"file": captions, "folder": ".", "split": None}],
        "splits": splits,
        "missing_images": "error",
        "bad_images": "error",
        "bad_captions": "error",
    }
    records, *_ = prepare(check(dataset, "dataset", DatasetParams, str(root)))
    return [replace(record, file=f"{root.name}/images/{record.file}") for record in records]


def read_scenes(data: Path, work: Path) -> Task:
    """Read the scenes of the default run; `data` is its folder of artifacts."""
    params = work / "params.yaml"
    params.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "params.yaml", params)
    weights = json.dumps(str(ROOT / "data/scenes/encoder.safetensors"))
    use(find_preset("scenes", ROOT / "presets"), [f"encode.weights={weights}", "train.select_by=last"], params)
    records = read_records(data / "prepared")

    def ids(split: Split, has_new: bool) -> tuple[int, ...]:
        return tuple(r.image_id for r in records if r.split == split and has_new_color(r) == has_new)

    start = Fold(train=ids("train", False), val=ids("val", False), test=ids("test", True))
    fold = Fold(train=ids("train", True)[:NUM_SCENES], val=ids("val", True), test=start.test)
    used = {*start.train_and_val, *start.test, *fold.train_and_val}
    return Task(
        images=make_image_set(
            [record for record in records if record.image_id in used],
            data / "scenes/rendered/images",
            load(params, "tokenize", TokenizeParams),
        ),
        params=params,
        start=start,
        folds=[fold],
    )


def has_new_color(record: Record) -> bool:
    """Whether a scene has an object of a new color."""
    return any(scene_object.attributes["color"] in NEW_COLORS for scene_object in record.objects)


def compare(name: str, task: Task, seeds: Sequence[int], work: Path, device: torch.device) -> None:
    """Train the initial model, continue it and train anew, and print the scores."""
    initial = Experiment(task.images, task.params, work, device)
    start = _start_model(initial, task.start, seeds[0])
    anew = _change(initial, "anew", FEW_STEPS_SETTING, f"train.max_epochs={NUM_EPOCHS}")
    systems = {
        "anew": anew,
        "anew_longer": _change(anew, "anew_longer", f"train.max_epochs={LONGER * NUM_EPOCHS}"),
        "continued": _change(anew, "continued", f"train.start_from={json.dumps(str(start))}"),
    }
    rows: list[tuple[str, Experiment, Sequence[Fold], int]] = [("start", initial, [task.start], seeds[0])]
    rows += [(system, experiment, task.folds, seed) for seed in seeds for system, experiment in systems.items()]
    scores: dict[Row, SystemScores] = {}
    objects: dict[Row, float] = {}
    for system, experiment, folds, seed in rows:
        for search, captions in _captions(experiment, folds, seed).items():
            row = Row(system, str(seed), search)
            scores[row] = score(captions, task.images.references)
            objects[row] = _object_accuracy(captions, task.images)
            print("\n".join(score_lines({row: scores[row]})), flush=True)
    print(
        f"\n{name}: {len(task.start.train)} images for start, {len(task.folds[0].train)} for the others,"
        f" {len(task.start.test)} test images; {load(task.params, 'train', TrainParams).max_epochs} epochs for start,"
        f" {NUM_EPOCHS} for anew and continued\n"
    )
    scores = add_means(scores)
    differences = difference_lines(scores, ["anew", "anew_longer"])
    print("\n".join([*SCORE_HEAD, *score_lines(scores), "", *DIFFERENCE_HEAD, *differences, ""]))
    if task.images.records[task.start.test[0]].objects:
        print("\n".join(f"objects, {' '.join(row)}: {accuracy:.3f}" for row, accuracy in objects.items()))


def _change(experiment: Experiment, name: str, *settings: str) -> Experiment:
    """Return the experiment with some settings changed, in a params file of that name."""
    params = experiment.params.with_name(f"{name}.yaml")
    shutil.copy(experiment.params, params)
    use(params, settings, params)
    return replace(experiment, params=params)


def _start_model(experiment: Experiment, fold: Fold, seed: int) -> Path:
    """Train the initial model and return its folder, which is named by the fingerprint of the run."""
    paths = TrainPaths(
        tokens=experiment.tokens(fold),
        features=experiment.features,
        work=experiment.work,
        live=experiment.work / "live",
    )
    params = replace(load(experiment.params, "train", TrainParams), seed=seed)
    with train(params, paths, experiment.device, INTERVALS) as model:
        return model


def _captions(experiment: Experiment, folds: Sequence[Fold], seed: int) -> dict[str, dict[int, Words]]:
    """Caption the test images of some folds, and return the captions of all by the name of the search."""
    result: dict[str, dict[int, Words]] = {}
    for fold in folds:
        captions = caption_fold(gridcap_system(experiment, [seed]), experiment.images, fold, experiment.work, False)
        for search, words in (captions or {}).items():
            result.setdefault(search, {}).update(words)
    return result


def _object_accuracy(captions: Mapping[int, Words], images: ImageSet) -> float:
    """Return the fraction of captions whose objects are all correct, of those that name one; NaN if there are none."""
    correct = [names_correctly(words, images.records[image_id].objects) for image_id, words in captions.items()]
    named = [value for value in correct if value is not None]
    return float(np.mean(named)) if named else float("nan")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.warm_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    real, data, work = ROOT.parent / "shared" / "real", ROOT / "data", ROOT / "data/.work/warm_start"
    add = parser.add_argument
    add("--real", type=Path, default=real, help="folder of photographs and encoder weights (default: %(default)s)")
    add("--data", type=Path, default=data, help="folder of `prepared` and `scenes/rendered` (default: %(default)s)")
    add("--work", type=Path, default=work, help="folder of features, models and captions (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="seeds of training (default: 1)")
    add("--device", default=os.environ.get("GRIDCAP_DEVICE", "auto"), help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    device = setup_device(arguments.device)
    datasets = (
        ("photographs", arguments.real, read_photographs),
        ("scenes", arguments.data / "prepared", read_scenes),
    )
    try:
        for name, folder, read in datasets:
            if folder.is_dir():
                source = arguments.real if name == "photographs" else arguments.data
                compare(name, read(source, arguments.work / name), arguments.seeds, arguments.work, device)
            else:
                print(f"{name}: skipped: {folder}: no such folder.")
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


if __name__ == "__main__":
    main()
