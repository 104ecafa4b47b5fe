"""Warm start (`train.start_from`) compared with training anew, on photographs and on scenes.

photographs: a model of the Flickr8k photographs in `--real` is continued on 60 of the 80 COCO photographs there, four
times, so that each COCO photograph is captioned once by models that were not trained on it. Training anew has the same
60 photographs and settings. 20 photographs a fold and 80 in all are few: read the intervals.

scenes: a model of the scenes without a yellow or purple object is continued on `--scenes` of those with one. Training
anew has the same scenes, settings and number of steps. Scores are those of the test scenes with a yellow or purple
object; `names` is the fraction of captions whose objects are all correct. The encoder has seen all colors.

Rows `start` are of the model that the others are continued from, as it is. Each row of the others has another seed.
Intervals are 95%, by bootstrap over images; those of a difference are paired. The folder `--real` is that of
`benchmarks.crossvalidation` with `coco/images` and `coco/captions_train2017_sample.json`; the folder `--data` has
`prepared` and `features` from `dvc repro encode`. An interrupted run resumes.
"""

# Sets environment variables that PyTorch reads when it is imported.
import stages  # noqa: F401

# isort: split
import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.crossvalidation import (
    INTERVALS,
    RESAMPLING,
    ROOT,
    Fold,
    ImageSet,
    SystemScores,
    assign_folds,
    encode_images,
    gridcap_system,
    image_set,
    log_to,
    out_of_fold,
    score,
    write_fold_tokens,
    write_params,
)
from pipeline.captions.records import Record, read_records
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.decoder.model_io import read_model
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.generation.generate import GenerateParams, generate
from pipeline.generation.search import SearchParams
from pipeline.metrics.bootstrap import Interval, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES
from pipeline.metrics.corpus import Words
from pipeline.params import check, load
from pipeline.scenes.caption_checker import names_correctly
from pipeline.training.train import TrainPaths, train
from pipeline.training.trainer import TrainParams

SCORES = ("BLEU-4", "CIDEr-D")
NEW_COLORS = {"yellow", "purple"}
NUM_FOLDS = 4
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


def read_photographs(real: Path, work: Path, params: Path, device: torch.device) -> tuple[ImageSet, Fold, list[Fold]]:
    """Read, tokenize and encode the photographs.

    Returns:
        The images, the fold of the initial model, which tests all COCO photographs, and the folds of the COCO
        photographs. The validation photographs are always those of Flickr8k.
    """
    policies = {"missing_images": "error", "bad_images": "error", "bad_captions": "error"}
    flickr = _records(
        real / "flickr",
        {
            "format": "flickr8k",
            "captions": [{"file": "captions.txt", "folder": ".", "split": None}],
            "splits": {"by": "json", "file": "splits.json"},
        }
        | policies,
    )
    coco = _records(
        real / "coco",
        {
            "format": "coco",
            "captions": [{"file": "captions_train2017_sample.json", "folder": ".", "split": None}],
            "splits": {"by": "seed", "seed": 0, "val": 0.1, "test": 0.1},  # required, and replaced by folds
        }
        | policies,
    )
    # Ids of the two datasets may be equal.
    records = [replace(record, image_id=image_id) for image_id, record in enumerate([*flickr, *coco])]
    images = encode_images(records, real, work, params, device)
    ids = {split: tuple(r.image_id for r in records[: len(flickr)] if r.split == split) for split in ("train", "val")}
    coco_ids = [record.image_id for record in records[len(flickr) :]]
    start = Fold(train=ids["train"], val=ids["val"], test=tuple(coco_ids))
    folds = [
        Fold(train=fold.train_and_val, val=ids["val"], test=fold.test)
        for fold in assign_folds(coco_ids, NUM_FOLDS, seed=0)
    ]
    return images, start, folds


def _records(root: Path, dataset: Mapping[str, Any]) -> list[Record]:
    """Read the records of a dataset in a subfolder of the root of all images."""
    params = check({"root": str(root), "images": "images", **dataset}, "dataset", DatasetParams, str(root))
    records, _ = prepare(params)
    return [replace(record, file=f"{root.name}/images/{record.file}") for record in records]


def read_scenes(data: Path, params: Path, num_scenes: int) -> tuple[ImageSet, Fold, list[Fold]]:
    """Read the scenes, as `read_photographs`; the one fold has `num_scenes` train scenes with a new color."""
    records = read_records(data / "prepared")
    images = image_set(records, data / "features", params)

    def ids(split: str, has_new: bool) -> tuple[int, ...]:
        return tuple(r.image_id for r in records if r.split == split and has_new == has_new_color(r))

    start = Fold(train=ids("train", False), val=ids("val", False), test=ids("test", True))
    return images, start, [Fold(train=ids("train", True)[:num_scenes], val=ids("val", True), test=start.test)]


def has_new_color(record: Record) -> bool:
    """Whether a scene has an object of a new color."""
    return any(scene_object.attributes["color"] in NEW_COLORS for scene_object in record.objects)


def compare(
    name: str,
    dataset: tuple[ImageSet, Fold, list[Fold]],
    params: TrainParams,
    search: SearchParams,
    num_seeds: int,
    work: Path,
    device: torch.device,
) -> None:
    """Train the initial model, continue it and train anew, and print the scores."""
    images, start_fold, folds = dataset
    start = _train_start(work / name, images, start_fold, params, work, device)
    test_ids = [image_id for fold in folds for image_id in fold.test]
    captions = {"start": _captions(start, images, test_ids, search, device)}
    for index in range(num_seeds):
        seeded = replace(params, seed=params.seed + index)
        for system, initial in (("anew", None), ("continued", start)):
            trained = gridcap_system(images, replace(seeded, start_from=initial), search, 1, device)
            captions[f"{system}, seed {index + 1}"] = out_of_fold(f"{name}-{system}", trained, images, folds, work)
    scores = {system: score(words, images.references) for system, words in captions.items()}
    print(
        f"\n{name}: {len(start_fold.train)} images for start, {len(folds[0].train)} for the others;"
        f" {params.max_epochs} epochs each; {len(test_ids)} test images"
    )
    print("\n".join(table(scores, num_seeds)))
    if any(images.records[image_id].objects for image_id in test_ids):
        for system, words in captions.items():
            correct = [names_correctly(words[i], images.records[i].objects) for i in test_ids]
            print(f"{system:>24} names {np.mean([value for value in correct if value is not None]):.3f}")


def table(scores: Mapping[str, SystemScores], num_seeds: int) -> list[str]:
    """Format a line for each system and each difference between continued and anew."""
    lines = [" ".join([f"{'':>24}", *(f"{metric:>23}" for metric in SCORES), " distinct"])]
    for name, system in scores.items():
        cells = [
            _format(score_interval(system.tables[metric], CORPUS_SCORES[metric], RESAMPLING), "") for metric in SCORES
        ]
        lines.append(" ".join([f"{name:>24}", *cells, f"{system.num_distinct:>9}"]))
    for seed in range(1, num_seeds + 1):
        continued, anew = scores[f"continued, seed {seed}"], scores[f"anew, seed {seed}"]
        cells = [
            _format(
                paired_difference(continued.tables[metric], anew.tables[metric], CORPUS_SCORES[metric], RESAMPLING), "+"
            )
            for metric in SCORES
        ]
        lines.append(" ".join([f"{f'continued - anew, seed {seed}':>24}", *cells]))
    return lines


def _train_start(
    folder: Path, images: ImageSet, fold: Fold, params: TrainParams, work: Path, device: torch.device
) -> Path:
    """Train the initial model and return its folder, which its fingerprint names."""
    write_fold_tokens(folder / "tokens", images, fold)
    paths = TrainPaths(tokens=folder / "tokens", features=images.features, work=work, live=folder / "live")
    with log_to(folder / "log.txt"), train(params, paths, device, INTERVALS) as model:
        return model


def _captions(
    model: Path, images: ImageSet, image_ids: Sequence[int], search: SearchParams, device: torch.device
) -> dict[int, Words]:
    generated = generate([read_model(model)], images.store, image_ids, search, batch_size=64, device=device)
    return {image.image_id: image.words for image in generated}


def _format(interval: Interval, sign: str) -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in (interval.value, interval.low, interval.high))
    return f"{f'{value} [{low}, {high}]':>23}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.warm_start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    real, data, work = ROOT.parent / "shared" / "real", ROOT / "data", ROOT / "data/.work/warm_start"
    add("--real", type=Path, default=real, help="folder of photographs and encoder weights (default: %(default)s)")
    add("--data", type=Path, default=data, help="folder of the scenes' records and features (default: %(default)s)")
    add("--work", type=Path, default=work, help="folder of features, models and captions (default: %(default)s)")
    add("--seeds", type=int, default=3, help="seeds of the continued models (default: %(default)s)")
    add("--epochs", type=int, help="epochs of every model (default: 12)")
    add("--scenes", type=int, default=100, help="scenes with a new color (default: %(default)s)")
    add("--device", default=os.environ.get("GRIDCAP_DEVICE", "auto"), help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args(argv)
    device = setup_device(arguments.device)
    try:
        for name in ("photographs", "scenes"):
            folder = arguments.real if name == "photographs" else arguments.data / "features"
            if not folder.is_dir():
                print(f"{name}: skipped: {folder}: no such folder.")
                continue
            place = arguments.work / name
            if name == "photographs":
                params = write_params(arguments.real, place, PHOTOGRAPH_SETTINGS)
                dataset = read_photographs(arguments.real, place, params, device)
            else:
                params = ROOT / "params.yaml"
                dataset = read_scenes(arguments.data, params, arguments.scenes)
            train_params = replace(load(params, "train", TrainParams), select_by="last")
            train_params = replace(train_params, max_epochs=arguments.epochs or train_params.max_epochs)
            search = replace(load(params, "generate", GenerateParams).search, beam_size=5, allow_unk=False)
            compare(name, dataset, train_params, search, arguments.seeds, place, device)
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


if __name__ == "__main__":
    main()
