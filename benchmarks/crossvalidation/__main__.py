"""Cross-validation on photographs: gridcap's decoders, encoders and training, a textbook decoder and retrieval.

A single split of a few hundred images (875 of Flickr8k) is too noisy: the standard error of CIDEr on 125 images is
0.03. Therefore each image is captioned by a system that was trained on the other folds, and all captions are scored
together by BLEU-4, CIDEr-D (which papers call CIDEr) and CIDEr, on lower-cased words without punctuation. Intervals are
95%, by bootstrap over images, paired for differences. CIDEr weights n-grams by their rarity among the scored images, so
it is lower on more images: retrieval scores 0.205 on all images and 0.23 on 125 at a time.

The folder `--real` holds `flickr/images`, `flickr/captions.txt` with the header `image,caption`, `flickr/splits.json`
with file names by split, the ResNet's `weights/resnet18-imagenet-to-layer3.pth` and, for systems with text,
`text/flickr8k_captions.csv`.

Systems: `textbook` is `benchmarks.soft_attention`, trained on all images of the other folds; without length
normalization. `retrieval` is `benchmarks.retrieval`, from all images of the other folds; it has no seed. All others are
gridcap: the preset flickr8k, the printed settings and those of the system in `SYSTEMS`. Up to 20 training images of a
fold are its validation split; its vocabulary is built from the remaining ones. Decoders search greedily and with beam
size 5, without `<unk>`. Systems with the same encoder share its features, and a refined system starts from the model of
the same system without refinement.

The last table counts words that captions use too often or too rarely, as `evaluate` does (docs/evaluation.md), with the
three words of the largest excess: the captions that have them and, in parentheses, those of them with a reference that
has them. `references` is one reference of each image against its others.

With several `--seeds`, the table also has the mean of the seeds' scores and the ensemble of their models. A seed is
compared with the same seed of the other system; a mean and an ensemble with the other system's mean.

Features, models and the captions of each fold are kept in the work folder under a fingerprint of settings, images and
code, and so is unfinished training: an interrupted run resumes. `--finished` prints the table of what is there.
"""

# Sets environment variables that PyTorch reads when it is imported.
import stages  # noqa: F401

# isort: split
import argparse
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import soft_attention
from benchmarks.crossvalidation.folds import NUM_FOLDS, ImageSet, assign_folds, read_images
from benchmarks.crossvalidation.systems import (
    PRESET,
    ROOT,
    SETTINGS,
    SYSTEMS,
    Captions,
    Experiment,
    System,
    caption_fold,
    gridcap_system,
    retrieval_system,
    textbook_system,
    write_params,
)
from benchmarks.crossvalidation.table import (
    DIFFERENCE_HEAD,
    RESAMPLING,
    SCORE_HEAD,
    USAGE_HEAD,
    Row,
    SystemScores,
    add_means,
    difference_lines,
    score,
    score_lines,
    usage_lines,
)
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.metrics.word_usage import leave_one_out
from pipeline.params import load, load_key

SELECTION_NOTE = """\
The settings above were selected by cross-validation on these same images, so the lead of gridcap is slightly
overestimated. Settings of textbook and retrieval are those of shared/real/README.md. Intervals cover the choice of
images, not of seeds."""


def seed_groups(name: str, seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the seeds of each row of a system: single ones and, for gridcap, all of them as an ensemble."""
    if name == "retrieval":
        return [()]
    singles: list[tuple[int, ...]] = [(seed,) for seed in seeds]
    return [*singles, tuple(seeds)] if name in SYSTEMS and len(seeds) > 1 else singles


def make_system(name: str, seeds: Sequence[int], experiment: Experiment) -> System:
    """Return a system by its name."""
    match name:
        case "textbook":
            compiled = load_key(experiment.params, "train.compile", bool)
            return textbook_system(experiment, soft_attention.Settings(seed=seeds[0], compile=compiled))
        case "retrieval":
            return retrieval_system(experiment)
        case _:
            return gridcap_system(experiment, seeds)


def caption_folds(label: str, system: System, images: ImageSet, arguments: argparse.Namespace) -> Captions:
    """Caption the images of the folds of `--folds`, each by the system that was trained without its fold.

    Returns:
        Caption of each image by the name of the search; empty if `--finished` and some folds are not finished.
    """
    folds = assign_folds(list(images.records))
    results = []
    for number in arguments.folds:
        start = time.monotonic()
        captions = caption_fold(system, images, folds[number - 1], arguments.work, arguments.finished)
        if captions is not None:
            results.append(captions)
        if not arguments.finished:
            print(f"{label}, fold {number}: {time.monotonic() - start:.0f} s", flush=True)
    if len(results) < len(arguments.folds):
        if results:
            print(f"{label}: {len(results)} of {len(arguments.folds)} folds are finished")
        return {}
    return {
        search: {image_id: words for captions in results for image_id, words in captions[search].items()}
        for search in results[0]
    }


def compare(arguments: argparse.Namespace) -> None:
    """Caption the images by each system, and print the table."""
    device = setup_device(arguments.device)
    base = write_params(arguments.real, arguments.work / "params", arguments.set)
    images = read_images(arguments.real, arguments.images, load(base, "tokenize", TokenizeParams))
    scores: dict[Row, SystemScores] = {}
    image_ids: set[int] = set()
    for name in arguments.systems:
        settings = [*SYSTEMS.get(name, ()), *arguments.set]
        params = write_params(arguments.real, arguments.work / "params", settings)
        experiment = Experiment(images, params, arguments.work, device)
        for seeds in seed_groups(name, arguments.seeds):
            label = " + ".join(map(str, seeds))
            system = make_system(name, seeds, experiment)
            captions = caption_folds(f"{name} {label}".strip(), system, images, arguments)
            image_ids.update(*captions.values())
            new = {Row(name, label, search): score(of, images.references) for search, of in captions.items()}
            if not arguments.finished:
                print("\n".join(score_lines(new)), flush=True)
            scores |= new
    scores = add_means(scores)
    print(f"\ngridcap: gridcap use {PRESET} {shlex.join([*SETTINGS, *arguments.set])}")
    print(f"folds {arguments.folds}; 95% intervals, {RESAMPLING.bootstrap_samples} bootstrap samples over images\n")
    print("\n".join([*SCORE_HEAD, *score_lines(scores), "", *DIFFERENCE_HEAD, *difference_lines(scores), ""]))
    scored = {image_id: images.references[image_id] for image_id in sorted(image_ids)}
    human = {Row("references", "", ""): score(*leave_one_out(scored))} if scored else {}
    print("\n".join([*USAGE_HEAD, *usage_lines(scores | human), ""]))
    print(SELECTION_NOTE)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Append gridcap's log to a file."""
    logger, handler = logging.getLogger("gridcap"), logging.FileHandler(path)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    names = [*SYSTEMS, "textbook", "retrieval"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossvalidation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--real",
        type=Path,
        default=ROOT.parent / "shared" / "real",
        help="folder of images and encoder weights (default: %(default)s)",
    )
    add(
        "--work",
        type=Path,
        default=ROOT / "data/.work/crossvalidation",
        help="folder of features, models and captions (default: %(default)s)",
    )
    add(
        "--systems",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help=f"systems to compare: {', '.join(names)} (default: all)",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="seeds of training (default: 1)")
    all_folds = list(range(1, NUM_FOLDS + 1))
    add(
        "--folds",
        nargs="+",
        type=int,
        choices=all_folds,
        default=all_folds,
        metavar="N",
        help=f"folds to caption and score, 1 to {NUM_FOLDS} (default: all)",
    )
    add("--finished", action="store_true", help="print the table of finished captions, without training")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of gridcap, such as train.max_epochs=20")
    add("--images", type=int, help="number of random images for a trial run (default: all)")
    add(
        "--device",
        default=os.environ.get("GRIDCAP_DEVICE", "auto"),
        help="auto, cpu, cuda or cuda:N (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if min(arguments.seeds) < 0:
        parser.error("--seeds: must be at least 0")
    if not arguments.real.is_dir():
        print(f"skipped: {arguments.real}: no such folder. Set --real to the folder of images and encoder weights.")
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        with _log_to(arguments.work / "log.txt"):
            compare(arguments)
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


if __name__ == "__main__":
    main()
