"""The systems under cross-validation, and the captions of their folds in the work folder."""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import retrieval, soft_attention
from benchmarks.crossvalidation.folds import Fold, ImageSet
from pipeline.artifacts import file_digest, fingerprint, fresh_folder, publish, read_json, work_folder, write_json
from pipeline.captions.records import Split
from pipeline.captions.sources.text_file import read_text_captions
from pipeline.captions.text import TextCaption
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.tokens import TOKENS_FILE, write_tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary
from pipeline.decoder.model_io import read_model
from pipeline.features.encoder import EncodeParams, load_encoder
from pipeline.features.encoding import encode, encoder_spec
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import GenerateParams, generate
from pipeline.import_graph import code_digest
from pipeline.metrics.corpus import Words
from pipeline.params import load, load_key, to_plain
from pipeline.presets import find_preset, use
from pipeline.training.loop import Intervals
from pipeline.training.refine import refine
from pipeline.training.self_critical import RefineParams
from pipeline.training.train import TrainPaths, train
from pipeline.training.trainer import TrainParams

ROOT = Path(__file__).parents[2]
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
_TEXT = ("train.text={real}/text/flickr8k_captions.csv", "train.max_epochs=18")
_REFINED_GENTLY = ("refine.max_epochs=2", "refine.lr.peak=2e-5", "refine.cross_entropy_weight=0.5")
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
    "refined_gently": _REFINED_GENTLY,
    "refined_greedy": ("refine.max_epochs=2", "refine.lr.peak=5e-5", "refine.baseline=greedy"),
    "text": _TEXT,
    "text_guided": (*_TEXT, "generate.search.guidance_scale=1.1"),
    "text_refined_gently": (*_TEXT, *_REFINED_GENTLY),
    "text_before": (*_TEXT, "train.text_pretraining.joint_weight=0", "train.max_epochs=10"),
}
"""Changes of each system of gridcap to `SETTINGS`."""
SEARCHES = {"greedy": 1, "beam 5": 5}
"""Beam size by name."""
INTERVALS = Intervals(checkpoint_steps=1000, checkpoint_seconds=60.0, live_steps=50)
Captions = Mapping[str, Mapping[int, Words]]
"""Caption of each image by the name of the search."""


@dataclass(frozen=True, kw_only=True)
class System:
    """A captioning system under cross-validation."""

    key: Mapping[str, Any]
    """Settings and digests of code that its captions depend on, as JSON values."""
    caption: Callable[[Fold], Captions]
    """Caption the test images of a fold."""


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
    def text(self) -> Sequence[TextCaption]:
        """Captions without images; none by default."""
        path = load_key(self.params, "train.text", Path | None)
        return [] if path is None else read_text_captions(path)

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
            text=self.text,
            code=code_digest("pipeline.captions.tokens"),
        )
        folder = self.work / "tokens" / key
        if not folder.is_dir():
            splits: dict[Split, Sequence[int]] = {"train": fold.train, "val": fold.val, "test": fold.test}
            dataset = self.images.tokenize_splits(self.tokenize_params, splits, folder, self.text)
            with fresh_folder(folder) as unfinished:
                write_vocabulary(unfinished / VOCABULARY_FILE, dataset.vocabulary)
                write_tokens(unfinished / TOKENS_FILE, dataset, self.tokenize_params, key)
                publish(unfinished, folder)
        return folder


def write_params(real: Path, folder: Path, assignments: Sequence[str]) -> Path:
    """Write a params file, as `gridcap use` does, and return its path.

    Its digest is its name, so that runs at the same time never read each other's settings.

    Args:
        real: Folder of images and encoder weights, which replaces `{real}` in assignments.
        folder: Folder of the file.
        assignments: Changes to `SETTINGS`, as KEY=VALUE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        path = Path(unfinished) / "params.yaml"
        shutil.copy(ROOT / "params.yaml", path)
        settings = [setting.replace("{real}", str(real.resolve())) for setting in (*SETTINGS, *assignments)]
        use(find_preset(PRESET, ROOT / "presets"), settings, path)
        return path.replace(folder / f"{file_digest(path)[:16]}.yaml")


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
    modules = ("text_pretraining" if experiment.text else "trainer", *(["self_critical"] if is_refined else []))
    return System(
        key={
            "seeds": seeds,
            "tokenize": to_plain(experiment.tokenize_params),
            "features": experiment.features_key,
            "text": experiment.text,
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
