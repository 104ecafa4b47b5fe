"""Cross-validation on photographs: gridcap's decoders, encoders and training, a textbook decoder and retrieval.

A single split of a few hundred images (875 of Flickr8k) is too noisy: the standard error of CIDEr on 125 images is
0.03. Therefore each image is captioned by a system that was trained on the other folds, and all captions are scored
together by BLEU-4, CIDEr-D (which papers call CIDEr) and CIDEr, on lower-cased words without punctuation. Intervals are
95%, by bootstrap over images, paired for differences. CIDEr weights n-grams by their rarity among the scored images, so
it is lower on more images: retrieval scores 0.205 on all images and 0.23 on 125 at a time.

The folder `--real` holds `flickr/images`, `flickr/captions.txt` with the header `image,caption`, `flickr/splits.json`
with file names by split, and the ResNet's `weights/resnet18-imagenet-to-layer3.pth`.

Systems: `textbook` is `benchmarks.soft_attention`, trained on all images of the other folds; without length
normalization. `retrieval` is `benchmarks.retrieval`, from all images of the other folds; it has no seed. All others are
gridcap: the preset flickr8k, the printed settings and those of the system in `SYSTEMS`. Up to 20 training images of a
fold are its validation split; its vocabulary is built from the remaining ones. Decoders search greedily and with beam
size 5, without `<unk>`. Systems with the same encoder share its features, and a refined system starts from the model of
the same system without refinement.

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
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import retrieval, soft_attention
from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish, read_json, work_folder, write_json
from pipeline.captions.records import Record, Split
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.tokens import TOKENS_FILE, TokenizedDataset, tokenize, write_tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary
from pipeline.decoder.model_io import read_model
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.encoder import EncodeParams, load_encoder
from pipeline.features.encoding import encode, encoder_spec
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import GenerateParams, generate
from pipeline.import_graph import code_digest
from pipeline.metrics.bootstrap import Interval, Resampling, Table, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES, compute_metrics
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.tokenizers import SPACY
from pipeline.params import check, load, to_plain
from pipeline.presets import find_preset, use
from pipeline.training.loop import Intervals
from pipeline.training.refine import refine
from pipeline.training.self_critical import RefineParams
from pipeline.training.train import TrainPaths, train
from pipeline.training.trainer import TrainParams

ROOT = Path(__file__).parents[1]
PRESET = "flickr8k"
SETTINGS = (
    "tokenize.min_count=2",
    "encode.architecture=resnet18",
    "encode.layer=layer3",
    "encode.weights={real}/weights/resnet18-imagenet-to-layer3.pth",
    "encode.views=[whole, whole_flipped, top_left, top_right_flipped, bottom_left_flipped, bottom_right]",
    "train.random_views=true",
    "train.max_epochs=20",
    "train.select_by=last",
    "train.precision=bfloat16",
    "train.compile=true",
    "refine.cross_entropy_weight=0.2",
    "refine.ema_decay=0.99",
    "refine.select_by=last",
    "refine.precision=bfloat16",
)
"""Changes to the preset, which is made for ten times as many images. `{real}` is the folder of `--real`."""
SYSTEMS: Mapping[str, Sequence[str]] = {
    "soft_attention": (),
    "top_down": ("train.decoder.kind=top_down",),
    "adaptive": ("train.decoder.kind=adaptive",),
    "int8": ("encode.precision=int8",),
    "pool7": ("encode.pool={height: 7, width: 7}",),
    "288px": ("encode.image_size=288",),
    "288px_pool9": ("encode.image_size=288", "encode.pool={height: 9, width: 9}"),
    "layer2_pool14": ("encode.layer=layer2", "encode.pool={height: 14, width: 14}"),
    "layer2": ("encode.layer=layer2",),
    "refined": ("refine.max_epochs=4", "refine.lr.peak=5e-5"),
    "refined_gently": ("refine.max_epochs=2", "refine.lr.peak=2e-5", "refine.cross_entropy_weight=0.5"),
    "refined_greedy": ("refine.max_epochs=2", "refine.lr.peak=5e-5", "refine.baseline=greedy"),
    "top_down_refined": ("train.decoder.kind=top_down", "refine.max_epochs=4", "refine.lr.peak=5e-5"),
    "adaptive_refined": ("train.decoder.kind=adaptive", "refine.max_epochs=4", "refine.lr.peak=5e-5"),
}
"""Changes of each system of gridcap to `SETTINGS`."""
BASELINES = ("soft_attention", "textbook", "retrieval")
"""Systems that all others are compared with."""
SEARCHES = {"greedy": 1, "beam 5": 5}
"""Beam size by name."""
SCORES = ("BLEU-4", "CIDEr-D", "CIDEr")
RESAMPLING = Resampling(bootstrap_samples=1000, seed=0)
NUM_FOLDS = 5
MAX_VAL_IMAGES = 20
INTERVALS = Intervals(checkpoint_steps=1000, checkpoint_seconds=60.0, live_steps=50)
SELECTION_NOTE = """\
The settings above were selected by cross-validation on these same images, so the lead of gridcap is slightly
overestimated. Settings of textbook and retrieval are those of shared/real/README.md. Intervals cover the choice of
images, not of seeds."""

Captions = Mapping[str, Mapping[int, Words]]
"""Caption of each image by the name of the search."""


class Row(NamedTuple):
    """Names a row of the table."""

    system: str
    seeds: str
    search: str


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Image ids of one fold: `test`, and all others split into `train` and `val`."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    """Validation images of gridcap; the other systems train on them."""
    test: tuple[int, ...]

    @property
    def train_and_val(self) -> tuple[int, ...]:
        """All images outside the fold."""
        return tuple(sorted(self.train + self.val))


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """The images and captions that all systems use."""

    folder: Path
    """Folder of the image files."""
    records: Mapping[int, Record]
    digests: Mapping[int, str]
    """SHA-256 of each image file."""
    references: Mapping[int, Sequence[Words]]
    """Captions of each image as words."""

    def tokenize_splits(
        self, params: TokenizeParams, splits: Mapping[Split, Sequence[int]], source: Path
    ) -> TokenizedDataset:
        """Tokenize the captions of images by split; errors name `source`."""
        records = [
            replace(self.records[image_id], split=split)
            for split, image_ids in splits.items()
            for image_id in image_ids
        ]
        return tokenize(records, params, source)

    def describe(self, fold: Fold) -> Any:
        """Return the records and image digests of a fold as JSON values."""
        return [
            [(asdict(self.records[image_id]), self.digests[image_id]) for image_id in part]
            for part in asdict(fold).values()
        ]


@dataclass(frozen=True, kw_only=True)
class System:
    """A captioning system under cross-validation."""

    key: Mapping[str, Any]
    """Settings and digests of code that its captions depend on, as JSON values."""
    caption: Callable[[Fold], Captions]
    """Caption the test images of a fold."""


def assign_folds(image_ids: Sequence[int], num_folds: int = NUM_FOLDS) -> list[Fold]:
    """Assign images to folds of nearly equal size by a seeded shuffle that does not depend on their order.

    Up to `MAX_VAL_IMAGES` of the images outside a fold, and at most a fifth of them, are its `val`.

    Raises:
        UserError: There are fewer images than folds.
    """
    if len(image_ids) < num_folds:
        raise UserError(f"--images {len(image_ids)}: must be at least the number of folds, {num_folds}.")
    order = np.random.default_rng(0).permutation(sorted(image_ids)).tolist()
    folds = []
    for fold in range(num_folds):
        train_and_val = [image_id for index, image_id in enumerate(order) if index % num_folds != fold]
        num_val = min(MAX_VAL_IMAGES, len(train_and_val) // 5)
        folds.append(
            Fold(
                train=tuple(train_and_val[num_val:]),
                val=tuple(train_and_val[:num_val]),
                test=tuple(order[fold::num_folds]),
            )
        )
    return folds


def read_images(real: Path, num_images: int | None, params: TokenizeParams) -> ImageSet:
    """Read the images and captions.

    Args:
        real: Folder of images and encoder weights.
        num_images: Size of a random sample of the images; None for all images.
        params: Tokenization of the references.
    """
    dataset = {
        "format": "flickr8k",
        "root": str(real / "flickr"),
        "images": "images",
        "captions": [{"file": "captions.txt", "folder": ".", "split": None}],
        "splits": {"by": "json", "file": "splits.json"},
        "missing_images": "error",
        "bad_images": "error",
        "bad_captions": "error",
    }
    folder = real / "flickr" / "images"
    all_records, _ = prepare(check(dataset, "dataset", DatasetParams, str(real)))
    all_records.sort(key=lambda record: record.image_id)
    order = np.random.default_rng(0).permutation(len(all_records))
    records = [all_records[index] for index in order[:num_images]]
    tokenizer = make_tokenizer(params)
    return ImageSet(
        folder=folder,
        records={record.image_id: record for record in records},
        digests={record.image_id: file_digest(folder / record.file) for record in records},
        references={
            record.image_id: [words for words in map(tokenizer, record.captions) if words] for record in records
        },
    )


@dataclass(frozen=True)
class Experiment:
    """Settings of one system of gridcap, with its tokens and features in the work folder."""

    images: ImageSet
    params: Path
    """Params file of the system."""
    work: Path
    device: torch.device

    @cached_property
    def tokenize_params(self) -> TokenizeParams:
        return load(self.params, "tokenize", TokenizeParams)

    @cached_property
    def encode_params(self) -> EncodeParams:
        return load(self.params, "encode", EncodeParams)

    @cached_property
    def features_key(self) -> str:
        """Fingerprint of the features of all images."""
        spec = encoder_spec(load_encoder(self.encode_params), self.encode_params)
        return fingerprint(
            spec=spec.fingerprint, views=self.encode_params.views, images=sorted(self.images.digests.items())
        )

    @cached_property
    def features(self) -> Path:
        """Folder of the feature store, which is written if it is missing."""
        store = self.work / "features" / self.features_key
        if not store.is_dir():
            records = list(self.images.records.values())
            num_threads = os.cpu_count() or 1
            with encode(records, self.images.folder, self.encode_params, self.work, self.device, num_threads) as result:
                publish(result.store, store)
        return store

    def tokens(self, fold: Fold) -> Path:
        """Return the folder of tokens and vocabulary of a fold, which are written if they are missing."""
        key = fingerprint(
            tokenize=to_plain(self.tokenize_params),
            images=self.images.describe(fold),
            code=code_digest("pipeline.captions.tokens"),
        )
        folder = self.work / "tokens" / key
        if not folder.is_dir():
            splits: dict[Split, Sequence[int]] = {"train": fold.train, "val": fold.val, "test": fold.test}
            dataset = self.images.tokenize_splits(self.tokenize_params, splits, folder)
            with fresh_folder(folder) as unfinished:
                write_vocabulary(unfinished / VOCABULARY_FILE, dataset.vocabulary)
                write_tokens(unfinished / TOKENS_FILE, dataset, self.tokenize_params, key)
                publish(unfinished, folder)
        return folder


def write_params(real: Path, path: Path, assignments: Sequence[str]) -> Path:
    """Write a params file, as `gridcap use` does, and return its path.

    Args:
        real: Folder of images and encoder weights, which replaces `{real}` in assignments.
        path: The file.
        assignments: Changes to `SETTINGS`, as KEY=VALUE.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "params.yaml", path)
    settings = [setting.replace("{real}", str(real.resolve())) for setting in (*SETTINGS, *assignments)]
    use(find_preset(PRESET, ROOT / "presets"), settings, path)
    return path


def gridcap_system(experiment: Experiment, seeds: Sequence[int]) -> System:
    """Return gridcap as a system: one model, or an ensemble of one model per seed."""
    device = experiment.device
    train_params = load(experiment.params, "train", TrainParams)
    refine_params = load(experiment.params, "refine", RefineParams)
    search_params = replace(load(experiment.params, "generate", GenerateParams).search, allow_unk=False)
    searches = {name: replace(search_params, beam_size=beam_size) for name, beam_size in SEARCHES.items()}

    def caption(fold: Fold) -> Captions:
        paths = TrainPaths(
            tokens=experiment.tokens(fold),
            features=experiment.features,
            work=experiment.work,
            live=experiment.work / "live",
        )
        models = []
        for seed in seeds:
            with (
                train(replace(train_params, seed=seed), paths, device, INTERVALS) as trained,
                refine(trained, replace(refine_params, seed=seed), paths, device, INTERVALS) as model,
            ):
                models.append(read_model(model))
        store = FeatureStore(paths.features)
        return {
            name: {
                image.image_id: image.words
                for image in generate(models, store, fold.test, params, batch_size=64, device=device)
            }
            for name, params in searches.items()
        }

    # A disabled stage has no settings that captions depend on.
    is_refined = refine_params.max_epochs > 0
    modules = ("trainer", "self_critical") if is_refined else ("trainer",)
    return System(
        key={
            "seeds": seeds,
            "tokenize": to_plain(experiment.tokenize_params),
            "features": experiment.features_key,
            "train": to_plain(train_params),
            "refine": to_plain(refine_params) if is_refined else None,
            "searches": [to_plain(params) for params in searches.values()],
            "code": _code_digest([f"pipeline.training.{name}" for name in modules] + ["pipeline.generation.generate"]),
        },
        caption=caption,
    )


def textbook_system(experiment: Experiment, settings: soft_attention.Settings) -> System:
    """Return the textbook decoder as a system."""
    images, device = experiment.images, experiment.device
    searches = {name: replace(soft_attention.SEARCH, beam_size=beam_size) for name, beam_size in SEARCHES.items()}

    def caption(fold: Fold) -> Captions:
        splits: dict[Split, Sequence[int]] = {"train": fold.train_and_val, "test": fold.test}
        dataset = images.tokenize_splits(experiment.tokenize_params, splits, experiment.work)
        store = FeatureStore(experiment.features)
        decoder = soft_attention.train(settings, dataset.splits["train"], store, dataset.vocabulary, device)
        return {
            name: soft_attention.generate(decoder, dataset.vocabulary, store, fold.test, params, device)
            for name, params in searches.items()
        }

    return System(
        key={
            "tokenize": to_plain(experiment.tokenize_params),
            "features": experiment.features_key,
            "train": asdict(settings),
            "searches": [to_plain(params) for params in searches.values()],
            "code": _code_digest(
                ("pipeline.decoder.additive_scores", "pipeline.generation.search"), ("benchmarks/soft_attention.py",)
            ),
        },
        caption=caption,
    )


def retrieval_system(experiment: Experiment) -> System:
    """Return retrieval as a system."""
    references = experiment.images.references

    def caption(fold: Fold) -> Captions:
        store = FeatureStore(experiment.features)

        def pooled(image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
            return np.asarray(store.grids(image_ids).mean(axis=1, dtype=np.float32))

        train_captions = [references[image_id] for image_id in fold.train_and_val]
        captions = retrieval.retrieve(pooled(fold.test), pooled(fold.train_and_val), train_captions)
        return {"": dict(zip(fold.test, captions, strict=True))}

    return System(
        key={
            "tokenize": to_plain(experiment.tokenize_params),
            "features": experiment.features_key,
            "neighbors": retrieval.NUM_NEIGHBORS,
            "code": _code_digest((), ("benchmarks/retrieval.py",)),
        },
        caption=caption,
    )


def _code_digest(modules: Sequence[str], files: Sequence[str] = ()) -> str:
    """Compute a digest of the code of modules with their imports, of single files, and of the tokenization."""
    digests = {module: code_digest(module) for module in (*modules, "pipeline.captions.tokens")}
    return fingerprint(**digests, **{file: file_digest(ROOT / file) for file in files})


def caption_fold(system: System, images: ImageSet, fold: Fold, work: Path, finished: bool) -> Captions | None:
    """Caption the test images of a fold by the system that was trained without them.

    Args:
        system: The system.
        images: The images.
        fold: The fold.
        work: Work folder; captions of an earlier run of the same system are reused.
        finished: Whether to only read captions of an earlier run.

    Returns:
        Caption of each image by the name of the search; None if `finished` and there are no captions of an earlier run.
    """
    key = fingerprint(**system.key, images=images.describe(fold), torch=torch.__version__)
    path = work / "captions" / key / "captions.json"
    if not path.is_file() and not finished:
        with work_folder(work, "captions", key):
            if not path.is_file():  # another process may have written it
                write_json(
                    path,
                    {
                        search: {str(image_id): " ".join(captions[image_id]) for image_id in fold.test}
                        for search, captions in system.caption(fold).items()
                    },
                )
    if not path.is_file():
        return None
    saved = read_json(path, dict[str, dict[str, str]], "Delete the file to caption the fold again.")
    return {
        search: {int(image_id): caption.split() for image_id, caption in captions.items()}
        for search, captions in saved.items()
    }


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


@dataclass(frozen=True, kw_only=True)
class SystemScores:
    """Scores of one system's captions."""

    tables: Mapping[str, Table]
    """For each of `SCORES` the per-image counts that it is computed from, by ascending image id."""
    num_distinct: int
    """Distinct captions."""
    mean_length: float
    """Words per caption."""

    @property
    def num_images(self) -> int:
        return len(self.tables["BLEU-4"])


def score(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> SystemScores:
    """Score a caption of each image against its references."""
    image_ids = tuple(sorted(captions))
    corpus = Corpus(
        image_ids=image_ids,
        hypotheses=tuple(captions[image_id] for image_id in image_ids),
        references=tuple(references[image_id] for image_id in image_ids),
        tokenization=SPACY,
    )
    return SystemScores(
        tables=compute_metrics(corpus, with_meteor=False, with_spice=False).tables,
        num_distinct=len({tuple(words) for words in corpus.hypotheses}),
        mean_length=float(np.mean([len(words) for words in corpus.hypotheses])),
    )


def mean_scores(scores: Sequence[SystemScores]) -> SystemScores:
    """Return the mean of several seeds' counts, whose scores are those of a typical seed without its luck."""
    return SystemScores(
        tables={metric: np.mean([seed.tables[metric] for seed in scores], axis=0) for metric in SCORES},
        num_distinct=round(np.mean([seed.num_distinct for seed in scores])),
        mean_length=float(np.mean([seed.mean_length for seed in scores])),
    )


def add_means(scores: Mapping[Row, SystemScores]) -> dict[Row, SystemScores]:
    """Add the mean of the seeds of each system that has several, after the last of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in scores:
        if row.seeds.isdigit():
            groups.setdefault((row.system, row.search), []).append(row)
    result: dict[Row, SystemScores] = {}
    for row, row_scores in scores.items():
        result[row] = row_scores
        group = groups.get((row.system, row.search), [])
        if len(group) > 1 and row == group[-1]:
            result[row._replace(seeds="mean")] = mean_scores([scores[seed] for seed in group])
    return result


def baseline_row(row: Row, system: str, rows: Sequence[Row]) -> Row | None:
    """Return the row of a baseline that a row is compared with; None if there is none or it is the row itself.

    It has the same search and the same seeds or, for a mean or an ensemble, the mean. Otherwise the first row is taken.
    """
    candidates = [other for other in rows if other.system == system and other.search in (row.search, "")]
    seeds = row.seeds if row.seeds.isdigit() else "mean"
    match = next((other for other in candidates if other.seeds == seeds), candidates[0] if candidates else None)
    return None if match == row else match


def score_lines(scores: Mapping[Row, SystemScores]) -> list[str]:
    """Format a line of a Markdown table for each row."""
    return [
        _line(
            *row,
            *(
                _format_interval(score_interval(system.tables[metric], CORPUS_SCORES[metric], RESAMPLING), "")
                for metric in SCORES
            ),
            str(system.num_distinct),
            f"{system.mean_length:.1f}",
        )
        for row, system in scores.items()
    ]


def difference_lines(scores: Mapping[Row, SystemScores]) -> list[str]:
    """Format a line of a Markdown table for the paired difference of each row and each baseline."""
    lines = []
    for row, system in scores.items():
        for name in BASELINES:
            baseline = baseline_row(row, name, list(scores))
            if baseline is None or row.system in BASELINES[1:]:
                continue
            intervals = {
                metric: paired_difference(
                    system.tables[metric], scores[baseline].tables[metric], CORPUS_SCORES[metric], RESAMPLING
                )
                for metric in SCORES
            }
            baseline_cider = float(CORPUS_SCORES["CIDEr-D"](scores[baseline].tables["CIDEr-D"].sum(axis=0)))
            gain = intervals["CIDEr-D"].value / baseline_cider if baseline_cider else float("nan")
            cells = (_format_interval(interval, "+") for interval in intervals.values())
            lines.append(_line(*row, f"{name} {baseline.seeds}".strip(), *cells, f"{gain:+.1%}"))
    return lines


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


SCORE_HEAD = (
    _line("system", "seed", "search", *SCORES, "distinct captions", "words"),
    _line(*["---"] * (len(SCORES) + 5)),
)
DIFFERENCE_HEAD = (
    _line("system", "seed", "search", "minus", *SCORES, "CIDEr-D gain"),
    _line(*["---"] * (len(SCORES) + 5)),
)


def _format_interval(interval: Interval, sign: str) -> str:
    value, low, high = (format(score, f"{sign}.3f") for score in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def seed_groups(name: str, seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the seeds of each row of a system: single ones and, for gridcap, all of them as an ensemble."""
    if name == "retrieval":
        return [()]
    singles: list[tuple[int, ...]] = [(seed,) for seed in seeds]
    return [*singles, tuple(seeds)] if name in SYSTEMS and len(seeds) > 1 else singles


def compare(arguments: argparse.Namespace) -> None:
    """Caption the images by each system, and print their scores."""
    device, work = setup_device(arguments.device), arguments.work
    base = write_params(arguments.real, work / "params" / "base.yaml", arguments.set)
    images = read_images(arguments.real, arguments.images, load(base, "tokenize", TokenizeParams))
    all_folds = assign_folds(list(images.records))
    folds = {number: all_folds[number - 1] for number in dict.fromkeys(arguments.folds)}

    def make_system(name: str, seeds: tuple[int, ...]) -> System:
        settings = [*SYSTEMS.get(name, ()), *arguments.set]
        params = write_params(arguments.real, work / "params" / f"{name}.yaml", settings)
        experiment = Experiment(images, params, work, device)
        match name:
            case "textbook":
                return textbook_system(experiment, soft_attention.Settings(seed=seeds[0]))
            case "retrieval":
                return retrieval_system(experiment)
            case _:
                return gridcap_system(experiment, seeds)

    scores: dict[Row, SystemScores] = {}
    for name in dict.fromkeys(arguments.systems):
        for seeds in seed_groups(name, list(dict.fromkeys(arguments.seeds))):
            label, system = " + ".join(map(str, seeds)), make_system(name, seeds)
            captions: dict[str, dict[int, Words]] = {}
            num_finished = 0
            for number, fold in folds.items():
                start = time.monotonic()
                fold_captions = caption_fold(system, images, fold, work, arguments.finished)
                if fold_captions is None:
                    continue
                num_finished += 1
                for search, of_search in fold_captions.items():
                    captions.setdefault(search, {}).update(of_search)
                if not arguments.finished:
                    duration = time.monotonic() - start
                    print(f"{name} {label}, fold {number}: {duration:.0f} s", flush=True)
            if num_finished == len(folds):
                new = {Row(name, label, search): score(of, images.references) for search, of in captions.items()}
                scores |= new
                if not arguments.finished:
                    print("\n".join(score_lines(new)), flush=True)
            elif num_finished:
                print(f"{name} {label}: {num_finished} of {len(folds)} folds are finished")
    scores = add_means(scores)
    num_images = sum(len(fold.test) for fold in folds.values())
    print(f"\ngridcap: gridcap use {PRESET} {shlex.join([*SETTINGS, *arguments.set])}")
    print(f"{num_images} images in {len(folds)} folds; 95% intervals, {RESAMPLING.bootstrap_samples} bootstrap samples")
    print("\n".join(["", *SCORE_HEAD, *score_lines(scores), "", *DIFFERENCE_HEAD, *difference_lines(scores), ""]))
    print(SELECTION_NOTE)


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
    all_folds = range(1, NUM_FOLDS + 1)
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
