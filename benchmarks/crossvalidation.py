"""Captions of photographs that no system trained on: ours, the textbook's decoder and retrieval, with their intervals.

A few hundred photographs (875 of Flickr8k) make a single split useless: the standard error of CIDEr on 125 of them is
0.03. So each is captioned by a system trained on the other folds, and all captions are scored together by the project's
scorers: BLEU-4, CIDEr-D (what papers call CIDEr) and CIDEr, on the words that `tokenize` makes of captions, lower-cased
and without punctuation. Intervals are of 95%, by bootstrap over images. CIDEr weighs n-grams by how rare they are among
the scored images, so it comes out lower on more of them: retrieval has 0.205 on all and 0.23 on 125 at a time.

All systems see the same photographs, as a ResNet-18 to layer3 encodes them at 224 px. Decoders caption by a beam of 5,
without `<unk>`. The folder `--real` holds `flickr/images`, `flickr/captions.txt` with a header `image,caption`,
`flickr/splits.json` with names of files by split, and that ResNet's `weights/resnet18-imagenet-to-layer3.pth`.

ours: the preset flickr8k with that encoder, settings that the program prints, and what `--set` says. Of the training
photographs of a fold up to 20 are held out to watch the training, and its vocabulary is that of the rest.
`--models 3` trains three, of other seeds, that vote on each word.
textbook: `benchmarks.soft_attention`, trained on all of them; its captions are ranked by log-probability, as is usual
there, and not by their length too.
retrieval: `benchmarks.retrieval`, from all of them.

The captions of a fold are kept in the work folder, under a fingerprint of settings, photographs and code, and so is
training of ours that is under way: a killed run goes on. The exit status is 1 where ours misses a target.
"""

# Before PyTorch, which reads what it sets.
import stages  # noqa: F401

# isort: split
import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import retrieval, soft_attention
from pipeline.artifacts import file_digest, fingerprint, work_folder, write_json
from pipeline.captions.records import Record, Split
from pipeline.captions.sources.dataset import DatasetParams, prepare
from pipeline.captions.tokenizer import TokenizeParams, make_tokenizer
from pipeline.captions.tokens import TOKENS_FILE, VOCABULARY_FILE, TokenizedDataset, tokenize, write_tokens
from pipeline.captions.vocabulary import write_vocabulary
from pipeline.decoder.model_io import read_model
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.encoder import EncodeParams
from pipeline.features.encoding import encode
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import GenerateParams, generate
from pipeline.generation.search import SearchParams
from pipeline.metrics.bootstrap import Interval, Resampling, Table, paired_difference, score_interval
from pipeline.metrics.caption_scores import CORPUS_SCORES, compute_metrics
from pipeline.metrics.corpus import Corpus, Words
from pipeline.metrics.tokenizers import SPACY
from pipeline.params import check, load, to_plain
from pipeline.presets import find_preset, use
from pipeline.training.train import TrainInputs, train_in
from pipeline.training.trainer import Intervals, TrainParams

ROOT = Path(__file__).parents[1]
PRESET = "flickr8k"
SCORES = ("BLEU-4", "CIDEr-D", "CIDEr")
RESAMPLING = Resampling(bootstrap_samples=1000, seed=0)
HELD_OUT = 20
GAIN = 0.15
"""Share of the textbook's CIDEr-D by which ours is to be higher."""
OURS = (
    "tokenize.min_count=2",
    "encode.views=[whole, whole_flipped, top_left, top_right_flipped, bottom_left_flipped, bottom_right]",
    "train.random_views=true",
    "train.max_epochs=20",
    "train.select_by=last",
    "train.precision=bfloat16",
    "train.compile=true",
)
"""Settings of ours besides the encoder and the preset's, which are for ten times as many photographs."""
RHYTHM = Intervals(checkpoint_steps=1000, checkpoint_seconds=60.0, live_steps=50)
CHOSEN = f"""\
How settings were chosen: those of ours (preset {PRESET}) by such folds of these same photographs, so its lead is
somewhat too kind; another --seed divides and trains anew. Those of textbook and retrieval are as shared/real/README.md
has them. A fold is trained once: intervals tell of other photographs, not of other seeds."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Ids of the images of one fold, `test`, and of all others."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    """Of the others, those that ours watches its training by; the other systems train on them."""
    test: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(sorted(self.train + self.val))


@dataclass(frozen=True, kw_only=True)
class Photographs:
    """What all systems are given."""

    records: Mapping[int, Record]
    words: Mapping[int, Sequence[Words]]
    """The captions of each image."""
    tokenize: TokenizeParams
    store: FeatureStore
    features: Path
    """The store's folder."""

    def tokens(self, source: Path, splits: Mapping[Split, Sequence[int]]) -> TokenizedDataset:
        records = [replace(self.records[image], split=split) for split, images in splits.items() for image in images]
        return tokenize(records, self.tokenize, source)


@dataclass(frozen=True, kw_only=True)
class System:
    """A way to caption the test images of a fold, by what is known of the others."""

    settings: Mapping[str, Any]
    """What decides its captions besides photographs and code, as JSON values."""
    code: str
    """Digest of the code that does."""
    caption: Callable[[Fold, Path], Mapping[int, Words]]
    """Takes a fold and a folder for unfinished work."""


def assign_splits(image_ids: Sequence[int], folds: int, seed: int) -> list[Fold]:
    """Divide images, by a seeded shuffle, into folds of like size; the order in which they are given plays no part.

    `HELD_OUT` of the images outside a fold, but at most a fifth of them, are its `val`.
    """
    if not 2 <= folds <= len(image_ids):
        raise UserError(f"--folds must be from 2 to the number of images, {len(image_ids)}, got {folds}")
    order = np.random.default_rng(seed).permutation(sorted(image_ids)).tolist()
    found = []
    for number in range(folds):
        others = [image_id for place, image_id in enumerate(order) if place % folds != number]
        held_out = min(HELD_OUT, len(others) // 5)
        found.append(
            Fold(train=tuple(others[held_out:]), val=tuple(others[:held_out]), test=tuple(order[number::folds]))
        )
    return found


def write_params(real: Path, work: Path, assignments: Sequence[str]) -> Path:
    """Write a params file as a user would, by the preset and assignments over it."""
    weights = str(real.resolve() / "weights" / "resnet18-imagenet-to-layer3.pth")
    encoder = {"architecture": "resnet18", "layer": "layer3", "image_size": 224, "weights": weights}
    fixed = [f"encode.{name}={json.dumps(value)}" for name, value in encoder.items()]
    params = work / "params.yaml"
    params.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "params.yaml", params)
    use(find_preset(PRESET, ROOT / "presets"), [*fixed, *OURS, *assignments], params)
    return params


def read_photographs(
    real: Path, work: Path, params: Path, count: int | None, seed: int, device: torch.device
) -> Photographs:
    """Read and encode all photographs, or `count` of them drawn by the seed."""
    dataset = {
        "format": "flickr8k",
        "root": str(real / "flickr"),
        "images": "images",
        "captions": [{"file": "captions.txt", "folder": ".", "split": None}],
        "splits": {"by": "json", "file": "splits.json"},
        "missing_images": "error",
        "bad_captions": "error",
    }
    found, _ = prepare(check(dataset, "dataset", DatasetParams, str(real)))
    found.sort(key=lambda record: record.image_id)
    records = [found[place] for place in np.random.default_rng(seed).permutation(len(found))[:count]]
    features, encoder = work / "features", load(params, "encode", EncodeParams)
    encode(records, real / "flickr" / "images", encoder, work, features, device, os.cpu_count() or 1)
    settings = load(params, "tokenize", TokenizeParams)
    split_words = make_tokenizer(settings)
    return Photographs(
        records={record.image_id: record for record in records},
        words={one.image_id: [words for words in map(split_words, one.captions) if words] for one in records},
        tokenize=settings,
        store=FeatureStore(features),
        features=features,
    )


def ours(
    photographs: Photographs, params: TrainParams, beams: SearchParams, models: int, device: torch.device
) -> System:
    """`models` of seeds that follow one another vote on each word."""
    store = photographs.store

    def caption(fold: Fold, folder: Path) -> Mapping[int, Words]:
        tokens = folder / "tokens"
        dataset = photographs.tokens(folder, {"train": fold.train, "val": fold.val, "test": fold.test})
        write_vocabulary(tokens / VOCABULARY_FILE, dataset.vocabulary)
        write_tokens(tokens / TOKENS_FILE, dataset, photographs.tokenize, folder.name)
        voters = []
        for number in range(models):
            run = folder / f"model-{number + 1}"
            run.mkdir(exist_ok=True)
            seeded = replace(params, seed=params.seed + number)
            with (run / "log.txt").open("a") as log, redirect_stdout(log):
                model = train_in(
                    run,
                    seeded,
                    TrainInputs(tokens=tokens, features=photographs.features, work=run.parent, live=run / "live"),
                    device,
                    RHYTHM,
                )
            voters.append(read_model(model))
        found = generate(voters, store, fold.test, beams, batch_size=64, device=device)
        return {one.image_id: one.words for one in found}

    return System(
        settings={"train": to_plain(params), "search": to_plain(beams), "views": store.views, "models": models},
        code=sources("pipeline/decoder"),
        caption=caption,
    )


def of_textbook(photographs: Photographs, settings: soft_attention.Settings, device: torch.device) -> System:
    store = photographs.store

    def caption(fold: Fold, folder: Path) -> Mapping[int, Words]:
        dataset = photographs.tokens(folder, {"train": fold.others, "test": fold.test})
        decoder = soft_attention.train(settings, dataset.splits["train"], store, dataset.vocabulary, device)
        return soft_attention.generate(decoder, dataset.vocabulary, store, fold.test, device)

    return System(
        settings={"train": asdict(settings), "search": to_plain(soft_attention.SEARCH)},
        code=sources(
            "benchmarks/soft_attention.py", *(f"pipeline/decoder/{name}.py" for name in ("choice", "energy", "search"))
        ),
        caption=caption,
    )


def of_retrieval(photographs: Photographs) -> System:
    def pooled(image_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.asarray(photographs.store.grids(image_ids).mean(axis=1, dtype=np.float32))

    def caption(fold: Fold, _: Path) -> Mapping[int, Words]:
        captions = [photographs.words[image_id] for image_id in fold.others]
        found = retrieval.retrieve(pooled(fold.test), pooled(fold.others), captions)
        return dict(zip(fold.test, found, strict=True))

    return System(settings={"neighbors": retrieval.NEIGHBORS}, code=sources("benchmarks/retrieval.py"), caption=caption)


def sources(*names: str) -> str:
    """Digest modules, those of packages too, and those that make words and ids of captions."""
    paths = [ROOT / name for name in (*names, "pipeline/captions/tokens.py", "pipeline/captions/vocabulary.py")]
    files = [file for path in paths for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]
    return fingerprint(**{str(file.relative_to(ROOT)): file_digest(file) for file in files})


def out_of_fold(
    name: str, system: System, photographs: Photographs, folds: Sequence[Fold], work: Path
) -> dict[int, Words]:
    """A caption of every image; those of a fold that the work folder has already are taken from there."""
    captions: dict[int, Words] = {}
    for number, fold in enumerate(folds, start=1):
        began = time.monotonic()
        key = fingerprint(
            settings=system.settings,
            code=system.code,
            tokenize=to_plain(photographs.tokenize),
            features=[photographs.store.fingerprint, photographs.store.views[0]],
            records=[[asdict(photographs.records[image]) for image in part] for part in asdict(fold).values()],
            torch=torch.__version__,
        )
        with work_folder(work, name, key) as folder:
            path = folder / "captions.json"
            kept = path.is_file()
            if not kept:
                found = system.caption(fold, folder)
                write_json(path, {str(image_id): " ".join(found[image_id]) for image_id in fold.test})
            captions |= {int(image_id): words.split() for image_id, words in json.loads(path.read_text()).items()}
        told = "kept from an earlier run" if kept else f"{time.monotonic() - began:.0f} s"
        print(f"{name}, fold {number} of {len(folds)}: {told} ({path})", flush=True)
    return captions


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The captions of one system."""

    tables: Mapping[str, Table]
    """For each of `SCORES` what is summed up over images, by ascending image id."""
    distinct: int
    words: float
    """A caption."""

    @property
    def images(self) -> int:
        return len(self.tables["BLEU-4"])


def score(captions: Mapping[int, Words], references: Mapping[int, Sequence[Words]]) -> Scored:
    image_ids = tuple(sorted(captions))
    hypotheses = tuple(captions[one] for one in image_ids)
    wanted = tuple(references[one] for one in image_ids)
    corpus = Corpus(image_ids=image_ids, hypotheses=hypotheses, references=wanted, tokenization=SPACY)
    return Scored(
        tables=compute_metrics(corpus, with_meteor=False, with_spice=False).tables,
        distinct=len({tuple(words) for words in hypotheses}),
        words=float(np.mean([len(words) for words in hypotheses])),
    )


def differences(scored: Mapping[str, Scored]) -> dict[str, dict[str, Interval]]:
    """Ours less each other system, in each score."""
    return {
        name: {
            score: paired_difference(
                scored["ours"].tables[score], other.tables[score], CORPUS_SCORES[score], RESAMPLING
            )
            for score in SCORES
        }
        for name, other in scored.items()
        if "ours" in scored and name != "ours"
    }


def table(scored: Mapping[str, Scored]) -> list[str]:
    """A line a system, and one for each difference to ours."""
    lines = [" ".join([f"{'':>16}", *(f"{name:>23}" for name in SCORES), " distinct  words"])]
    for name, system in scored.items():
        scores = [_told(score_interval(system.tables[one], CORPUS_SCORES[one], RESAMPLING), "") for one in SCORES]
        lines.append(" ".join([f"{name:>16}", *scores, f"{system.distinct:>9}  {system.words:>5.1f}"]))
    for name, found in differences(scored).items():
        lines.append(" ".join([f"{f'ours - {name}':>16}", *(_told(found[score], "+") for score in SCORES)]))
    return lines


def _told(interval: Interval, sign: str) -> str:
    value, low, high = (format(number, f"{sign}.3f") for number in (interval.value, interval.low, interval.high))
    return f"{f'{value} [{low}, {high}]':>23}"


def targets(scored: Mapping[str, Scored]) -> dict[str, bool]:
    """What ours is to reach beside the systems that ran, and whether it does."""
    if "ours" not in scored:
        return {}
    distinct, images = scored["ours"].distinct, scored["ours"].images
    found = {f"at least half as many distinct captions as photographs: {distinct} of {images}": 2 * distinct >= images}
    for name, gain in differences(scored).items():
        bleu_gain, cider_gain = gain["BLEU-4"], gain["CIDEr-D"]
        if name == "retrieval":
            found[f"CIDEr-D above that of retrieval: {cider_gain.value:+.3f}"] = cider_gain.value > 0
            continue
        wanted = GAIN * float(CORPUS_SCORES["CIDEr-D"](scored[name].tables["CIDEr-D"].sum(axis=0)))
        found |= {
            f"CIDEr-D {GAIN:.0%} above that of {name}, or {wanted:+.3f}: {cider_gain.value:+.3f}": (
                cider_gain.value >= wanted
            ),
            f"the interval of that difference above 0: from {cider_gain.low:+.3f}": cider_gain.low > 0,
            f"BLEU-4 not below that of {name} beyond noise: up to {bleu_gain.high:+.3f}": bleu_gain.high >= 0,
        }
    return found


def compare(arguments: argparse.Namespace) -> bool:
    """Run the systems and print how they compare; returns whether ours reached all targets."""
    device = setup_device(arguments.device)
    work, seed = arguments.work, arguments.seed
    params = write_params(arguments.real, work, arguments.set)
    decoder, plainer = load(params, "train", TrainParams), soft_attention.Settings()
    most = arguments.epochs or max(decoder.max_epochs, plainer.num_epochs)
    decoder = replace(decoder, max_epochs=min(most, decoder.max_epochs), seed=decoder.seed + seed)
    plainer = replace(plainer, num_epochs=min(most, plainer.num_epochs), seed=plainer.seed + seed)
    beams = replace(load(params, "generate", GenerateParams).search, beam_size=5, allow_unk=False)

    photographs = read_photographs(arguments.real, work, params, arguments.images, seed, device)
    folds = assign_splits(list(photographs.records), arguments.folds, seed)
    systems = {
        "ours": ours(photographs, decoder, beams, arguments.models, device),
        "textbook": of_textbook(photographs, plainer, device),
        "retrieval": of_retrieval(photographs),
    }
    scored = {}
    for name in dict.fromkeys(arguments.systems):
        captions = out_of_fold(name, systems[name], photographs, folds, work)
        scored[name] = score(captions, photographs.words)
    count = len(photographs.records)
    print(f"\nours: gridcap use {PRESET} {shlex.join([*OURS, *arguments.set])}")
    print(f"{count} photographs in {len(folds)} folds; 95% intervals of {RESAMPLING.bootstrap_samples} resamples")
    print("\n".join(table(scored)))
    found = targets(scored)
    for target, reached in found.items():
        print(f"{'reached' if reached else 'MISSED':>16} {target}")
    print(CHOSEN)
    return all(found.values())


def main(flags: Sequence[str] | None = None) -> None:
    names = ["ours", "textbook", "retrieval"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crossvalidation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--real", type=Path, default=ROOT.parent / "shared" / "real", help="folder of the photographs and weights")
    add("--work", type=Path, default=ROOT / "data/.work/crossvalidation", help="folder for features and captions")
    add("--folds", type=int, default=5)
    add("--systems", nargs="+", choices=names, default=names)
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of ours, such as train.max_epochs=20")
    add("--models", type=int, default=1, help="models of ours that vote")
    add("--seed", type=int, default=0, help="another one divides into other folds and trains from other weights")
    add("--images", type=int, help="photographs to take, for a trial; all without it")
    add("--epochs", type=int, help="epochs of either decoder at most, for a trial")
    add("--device", default=os.environ.get("GRIDCAP_DEVICE", "auto"), help="auto, cpu or cuda")
    arguments = parser.parse_args(flags)
    if not arguments.real.is_dir():
        print(f"skipped: there is no folder {arguments.real}, which would hold the photographs")
        return
    try:
        sys.exit(0 if compare(arguments) else 1)
    except UserError as error:
        parser.exit(UserError.exit_status, f"error: {error}\n")


if __name__ == "__main__":
    main()
