"""From pictures to captions: the one way that `gridcap predict`, the app and callers in Python take.

    captioner = Captioner.load(Path("data/model"))
    for caption in captioner.caption(["bench.jpg", "harbor.png"]):
        print(caption.text, caption.confidence)

Shapes: `B` images, `N` captions an image, `T` words, `P` regions in a grid of `h` x `w`, `C` channels, `S` side in px.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count, islice
from pathlib import Path
from typing import cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.decoder.model_io import CONFIG_FILE, REMEDY, ModelConfig, TrainedModel
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.encoder import IMAGES_PER_BATCH, encode_batch, for_inference, runs_on_cpu
from pipeline.features.images import Pixels, View, read_views
from pipeline.features.store import Grids
from pipeline.generation.ensemble import caption, precompute, read_models
from pipeline.generation.search import Hypothesis, SearchParams
from pipeline.prediction.weights import find_encoder

USUAL_SEARCH = replace(
    SearchParams.greedy(30),
    beam_size=5,
    length_normalization="average",
    length_alpha=0.5,
    no_repeat_ngram_size=4,
    seed=1,
)
"""What captions are searched with unless the caller says otherwise: the settings that params.yaml comes with."""

Picture = Path | str | bytes | Image.Image
"""A file's path, the bytes of one, or what Pillow made of one."""

IMAGES_TOGETHER = 64
"""Images that one search works on; captions come as soon as those of so many images are found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Caption:
    """What a picture shows, in words, and where the decoder looked for each."""

    words: tuple[str, ...]
    log_probability: float
    """Sum over the words, and the end where it was reached, in nats."""
    score: float
    """What the search ranked captions by."""
    word_probabilities: tuple[float, ...]
    """Of each word, where those before it are given."""
    attention: npt.NDArray[np.float32]
    """[T, h, w]: for each word the share of attention on each part of the picture; each map sums to 1."""
    alternatives: tuple["Caption", ...]
    """The other captions that the search was asked for (`n_best`), the best first."""

    @property
    def text(self) -> str:
        """The words, joined by spaces."""
        return " ".join(self.words)

    @property
    def confidence(self) -> float:
        """Geometric mean of the words' probabilities; 0 for a caption without words."""
        if not self.words:
            return 0.0
        return math.prod(self.word_probabilities) ** (1 / len(self.words))


class Captioner:
    """A decoder, or several that vote, with their encoder, ready for pictures. Calls from several threads are safe."""

    def __init__(self, models: Sequence[TrainedModel], network: nn.Module, device: torch.device, threads: int) -> None:
        """`network` is the models' encoder, made ready by `for_inference`; `load` makes all of this from a folder."""
        self._model = models[0]
        self._decoders = [model.decoder.to(device) for model in models]
        self._network = network
        self._device = device
        self._threads = threads

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        ensemble: Path | str | None = None,
        encoder_weights: Path | str | None = None,
        download: bool = False,
        device: str = "auto",
        threads: int | None = None,
    ) -> "Captioner":
        """Load a model folder, as `train` or `gridcap export` wrote it, and find its encoder's weights by their digest.

        `ensemble` is a folder of more model folders, of the same words and the same encoder, whose probabilities are
        averaged with the model's. `encoder_weights` names the encoder's weights where they are neither in the folder
        nor where the training run had them; `download` allows torchvision's to be fetched. `device` is auto, cpu or
        cuda; `threads` read and decode images ahead of the encoder, one a processor unless told otherwise.

        Raises `UserError`, naming the file, where one is missing or damaged, or does not belong to the others.
        """
        models = read_models(Path(folder), None if ensemble is None else Path(ensemble))
        if ensemble is not None and len(models) == 1:
            raise UserError(f"{ensemble}: holds no model folder; put copies of models into it, or leave --ensemble out")
        config = models[0].config
        if config.view not in get_args(View):
            raise UserError(
                f"{Path(folder) / CONFIG_FILE}: view must be one of {', '.join(get_args(View))}, got {config.view}."
                f" {REMEDY}"
            )
        given = None if encoder_weights is None else Path(encoder_weights)
        encoder = find_encoder(Path(folder), config, given, download)
        where = setup_device(device)
        network = for_inference(encoder, config.encoder.precision, False, where)
        return cls(models, network, where, threads or os.cpu_count() or 1)

    @property
    def config(self) -> ModelConfig:
        """What the model was built as, and trained on."""
        return self._model.config

    def caption(self, images: Iterable[Picture], search: SearchParams = USUAL_SEARCH) -> list[Caption]:
        """Caption pictures, in their order.

        Pictures are turned upright by their EXIF block and shown to the encoder as in `encode`, whatever their colors
        and their size. A picture's captions depend on its pixels and the settings alone, but for the rounding of
        smaller batches. Raises `UserError` where one cannot be read, and `TypeError` as `stream` does.
        """
        captions = []
        for found in self.stream(images, search):
            if isinstance(found, UserError):
                raise found
            captions.append(found)
        return captions

    def stream(
        self, images: Iterable[Picture], search: SearchParams = USUAL_SEARCH, names: Iterable[str] | None = None
    ) -> Iterator[Caption | UserError]:
        """Caption pictures as they come, in their order; in place of one that cannot be read comes what is wrong.

        Errors call pictures that are no files by their `names`, or by number where there are none. The next pictures
        are read and decoded while the encoder and the search work on those before. Raises `TypeError` for a picture
        that stands in no list.
        """
        # A text or bytes would be taken letter by letter.
        if isinstance(images, Picture):
            raise TypeError(f"pictures come in a list, even one: give [picture], not a bare {type(images).__name__}")
        names = (f"image {number}" for number in count(1)) if names is None else names
        with ThreadPoolExecutor(self._threads) as pool:
            pictures = self._pictures(pool, zip(images, names, strict=False))
            asked: list[Tensor] | None = None
            while group := list(islice(pictures, IMAGES_TOGETHER)):
                read = [picture for picture in group if not isinstance(picture, UserError)]
                # For fewer pictures it costs more than it saves.
                if asked is None and len(read) == IMAGES_TOGETHER:
                    asked = precompute(self._decoders, search)
                captions = iter(self._caption(np.stack(read), search, asked) if read else [])
                for picture in group:
                    yield picture if isinstance(picture, UserError) else next(captions)

    def grids(self, pictures: Pixels) -> Grids:
        """Encode pictures, uint8 [B, S, S, 3], to grids, float16 [B, P, C], as `encode` does."""
        grids = []
        for start in range(0, len(pictures), IMAGES_PER_BATCH):
            batch = pictures[start : start + IMAGES_PER_BATCH]
            grids.append(encode_batch(self._network, batch, self._size(len(batch))))
        return np.concatenate(grids)

    def pixels(self, image: Picture, name: str = "image") -> Pixels:
        """Read a picture as the encoder sees it: uint8 [S, S, 3]. Raises `UserError` where it cannot be read."""
        source = Path(image) if isinstance(image, str) else image
        if isinstance(source, Image.Image) and 0 in source.size:
            raise UserError(
                f"{name}: cannot be read as a picture ({source.width} x {source.height} px); give one that has pixels"
            )
        # Only `encode` writes features, of views that `read_views` makes.
        view = cast(View, self.config.view)
        square: Pixels = read_views(source, self.config.encoder.image_size, (view,), name)[0]
        return square

    def _size(self, pictures: int) -> int:
        """Pictures of a batch: on a CPU a lone picture should not wait for fifteen black ones.

        `encode` always takes full batches, whose bits are the same for any number of threads. Those of smaller ones
        were the same from two pictures on with two threads, and a step of float16 off with one and ResNet-50.
        """
        if not runs_on_cpu(self.config.encoder.precision, self._device):
            return IMAGES_PER_BATCH
        return max(2, 1 << (pictures - 1).bit_length())

    def _pictures(
        self, pool: ThreadPoolExecutor, images: Iterable[tuple[Picture, str]]
    ) -> Iterator[Pixels | UserError]:
        coming: deque[Future[Pixels | UserError]] = deque()
        for image, name in images:
            coming.append(pool.submit(self._read, image, name))
            if len(coming) > IMAGES_TOGETHER + self._threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def _read(self, image: Picture, name: str) -> Pixels | UserError:
        try:
            return self.pixels(image, name)
        except UserError as error:
            return error

    @torch.inference_mode()
    def _caption(self, pictures: Pixels, search: SearchParams, asked: Sequence[Tensor] | None) -> list[Caption]:
        grids = torch.from_numpy(self.grids(pictures)).to(self._device)
        # What is drawn for a picture goes by its pixels, so that it is the same whatever stands beside it.
        ids = [int.from_bytes(sha256(picture.tobytes()).digest()[:7]) for picture in pictures]
        found = caption(self._decoders, grids, ids, search, asked)
        return [self._told(best, tuple(self._told(other, ()) for other in others)) for best, *others in found]

    def _told(self, found: Hypothesis, alternatives: tuple[Caption, ...]) -> Caption:
        return Caption(
            words=tuple(self._model.vocabulary.words[number] for number in found.words),
            log_probability=found.log_probability,
            score=found.score,
            word_probabilities=tuple(map(math.exp, found.word_log_probabilities)),
            attention=found.attention.reshape(-1, *self.config.encoder.grid).numpy(),
            alternatives=alternatives,
        )
