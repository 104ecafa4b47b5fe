"""Captions of any image: the `Captioner` behind `gridcap predict`, the app and the Python API.

    from gridcap import Captioner

    captioner = Captioner.load("data/model")
    for caption in captioner.caption(["bench.jpg", "harbor.png"]):
        print(caption.text, caption.confidence)

Shapes: `B` images, `T` words, `P` regions in a grid of `H` x `W`, `C` channels, `Y` and
`X` height and width of the encoder's input in px.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.decoder.model_io import ModelConfig, TrainedModel
from pipeline.device import setup_device
from pipeline.errors import UserError
from pipeline.features.encoder import IMAGES_PER_BATCH, encode_batch, optimize_for_inference, runs_on_cpu
from pipeline.features.images import Pixels, read_views
from pipeline.features.store import Grids
from pipeline.generation.caption import Caption
from pipeline.generation.ensemble import caption_grids, precompute, read_models
from pipeline.generation.search import SearchParams
from pipeline.generation.search_settings import find_search_settings
from pipeline.prediction.encoder_weights import find_encoder

DEFAULT_SEARCH = replace(
    SearchParams.greedy(30),
    beam_size=5,
    length_normalization="average",
    length_alpha=0.5,
    no_repeat_ngram_size=4,
    seed=1,
)
"""Search settings of models without recorded settings."""

ImageSource = Path | str | bytes | Image.Image
"""Path of an image file, its bytes, or a Pillow image."""

SEARCH_BATCH_SIZE = 64
"""Images per batch of the search."""


class Captioner:
    """A model or an ensemble with its encoder, to caption images. Thread-safe."""

    search: SearchParams
    """Default search settings of `caption` and `stream`: the recorded settings of the model, if any."""

    def __init__(
        self,
        models: Sequence[TrainedModel],
        encoder: nn.Module,
        device: torch.device,
        num_threads: int,
        search: SearchParams = DEFAULT_SEARCH,
    ) -> None:
        """Combine a loaded model and its encoder; `Captioner.load` loads both from files.

        Args:
            models: One model, or an ensemble from `read_models`.
            encoder: Encoder of the models, from `optimize_for_inference`.
            device: Device to encode and decode on.
            num_threads: Threads that read and decode image files.
            search: Default search settings.
        """
        self.search = search
        self._model = models[0]
        self._decoders = [model.decoder.to(device) for model in models]
        self._encoder = encoder
        self._device = device
        self._num_threads = num_threads

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        ensemble: Path | str | None = None,
        encoder_weights: Path | str | None = None,
        download: bool = False,
        device: str = "auto",
        num_threads: int | None = None,
    ) -> "Captioner":
        """Load a model folder, the encoder it was trained with, and the recorded search settings.

        Args:
            folder: Model folder, from `refine` or `gridcap export`.
            ensemble: Folder of additional model folders, whose word probabilities are averaged with the model's.
            encoder_weights: File with the encoder's weights; None to find it in the model folder, where `encode` read
                it, or in torchvision's cache.
            download: Download torchvision's weights if they are missing.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            num_threads: Threads that read image files; None for one per CPU core.

        Raises:
            UserError: A file is missing or damaged, or the files are from different training runs.
        """
        folder = Path(folder)
        models = read_models(folder, None if ensemble is None else Path(ensemble))
        if ensemble is not None and len(models) == 1:
            raise UserError(f"{ensemble}: contains no model folder. Copy model folders into it, or omit --ensemble.")
        config = models[0].config
        encoder = find_encoder(folder, config, None if encoder_weights is None else Path(encoder_weights), download)
        torch_device = setup_device(device)
        return cls(
            models,
            encoder=optimize_for_inference(encoder, config.encoder.precision, False, torch_device),
            device=torch_device,
            num_threads=num_threads or os.cpu_count() or 1,
            search=find_search_settings(folder, config.fingerprint) or DEFAULT_SEARCH,
        )

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model: sizes, encoder and training run."""
        return self._model.config

    def caption(self, images: Iterable[ImageSource], search: SearchParams | None = None) -> list[Caption]:
        """Caption images, in their order.

        Images are rotated by their EXIF orientation, converted to RGB and resized as in `encode`. The captions of an
        image do not depend on the other images, apart from rounding in smaller batches.

        Args:
            images: Paths or bytes of image files, or Pillow images.
            search: Search settings; None for `self.search`.

        Returns:
            The best caption of each image, with attention [T, H, W]. Its `alternatives` are up to `n_best - 1` further
            captions.

        Raises:
            UserError: An image cannot be read.
            TypeError: `images` is a single image instead of a list.
        """
        captions = []
        for result in self.stream(images, search):
            if isinstance(result, UserError):
                raise result
            captions.append(result)
        return captions

    def stream(
        self,
        images: Iterable[ImageSource],
        search: SearchParams | None = None,
        names: Iterable[str] | None = None,
    ) -> Iterator[Caption | UserError]:
        """Caption images lazily, in their order, while the next images are read in the background.

        Args:
            images: As for `caption`.
            search: As for `caption`.
            names: Names of the images in errors, used for images that are not files; None for `image 1`, `image 2`, ...

        Yields:
            The caption of each image, or the error if the image cannot be read.

        Raises:
            TypeError: `images` is a single image instead of a list.
        """
        # A string or bytes would be iterated over character by character.
        if isinstance(images, ImageSource):
            raise TypeError(f"images must be a list, even for one image: [image], not {type(images).__name__}")
        search = self.search if search is None else search
        names = (f"image {index}" for index in count(1)) if names is None else names
        with ThreadPoolExecutor(self._num_threads) as pool:
            read_images = self._read_ahead(pool, zip(images, names, strict=False))
            word_projections: list[Tensor] | None = None
            while batch := list(islice(read_images, SEARCH_BATCH_SIZE)):
                pixels = [image for image in batch if not isinstance(image, UserError)]
                # Precomputing takes longer than it saves for fewer images.
                if word_projections is None and len(pixels) == SEARCH_BATCH_SIZE:
                    word_projections = precompute(self._decoders, search)
                captions = iter(self._caption_batch(np.stack(pixels), search, word_projections) if pixels else [])
                for image in batch:
                    yield image if isinstance(image, UserError) else next(captions)

    def encode(self, pixels: Pixels) -> Grids:
        """Encode images, uint8 [B, Y, X, 3], to grids, float16 [B, P, C], as stage `encode` does."""
        grids = []
        for start in range(0, len(pixels), IMAGES_PER_BATCH):
            batch = pixels[start : start + IMAGES_PER_BATCH]
            grids.append(encode_batch(self._encoder, batch, self._encoder_batch_size(len(batch))))
        return np.concatenate(grids)

    def read_image(self, image: ImageSource, name: str = "image") -> Pixels:
        """Read an image as the encoder's input, uint8 [Y, X, 3].

        Args:
            image: Path or bytes of an image file, or a Pillow image.
            name: Name of the image in errors, used if it is not a file.

        Raises:
            UserError: The image cannot be read.
        """
        source = Path(image) if isinstance(image, str) else image
        if isinstance(source, Image.Image) and 0 in source.size:
            raise UserError(f"{name}: has no pixels ({source.width} x {source.height} px). Use another image.")
        view = self.config.view
        pixels: Pixels = read_views(source, self.config.encoder.frame, (view,), name)[0]
        return pixels

    def _encoder_batch_size(self, num_images: int) -> int:
        """Return the batch size to which images are padded.

        Stage `encode` always uses full batches, which give the same bits with any number of threads. On a CPU, padding
        one image to a full batch would cost a full batch. Smaller batches may differ in the last digit of float16.
        """
        if not runs_on_cpu(self.config.encoder.precision, self._device):
            return IMAGES_PER_BATCH
        return max(2, 1 << (num_images - 1).bit_length())

    def _read_ahead(
        self, pool: ThreadPoolExecutor, images: Iterable[tuple[ImageSource, str]]
    ) -> Iterator[Pixels | UserError]:
        """Read images in the threads of `pool`, slightly more than one search batch ahead of the caller."""
        pending: deque[Future[Pixels | UserError]] = deque()
        for image, name in images:
            pending.append(pool.submit(self._read_or_error, image, name))
            if len(pending) > SEARCH_BATCH_SIZE + self._num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _read_or_error(self, image: ImageSource, name: str) -> Pixels | UserError:
        try:
            return self.read_image(image, name)
        except UserError as error:
            return error

    @torch.inference_mode()
    def _caption_batch(
        self, pixels: Pixels, search: SearchParams, word_projections: Sequence[Tensor] | None
    ) -> list[Caption]:
        grids = torch.from_numpy(self.encode(pixels)).to(self._device)  # [B, P, C]
        # The pixels of an image seed its samples, which therefore depend neither on its index nor on other images.
        image_ids = [int.from_bytes(sha256(image.tobytes()).digest()[:7]) for image in pixels]
        vocabulary = self._model.vocabulary
        results = caption_grids(self._decoders, vocabulary.words, grids, image_ids, search, word_projections)
        grid = self.config.encoder.grid
        best_captions = []
        for captions in results:
            best, *others = (result.complete(grid, vocabulary.language) for result in captions)
            best_captions.append(replace(best, alternatives=tuple(others)))
        return best_captions
