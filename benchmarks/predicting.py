"""Seconds from pictures to captions: `gridcap predict` beside the stages `encode` and `generate`, in one run.

Both begin with files, a model folder and the encoder's weights, load what they need and end with all captions, by the
usual search. The stages write a feature store in between, the captioner nothing. Weights are random, so captions are as
long as they may be. Rounds take both in turn; seconds are medians, and so is the ratio, taken within each round. lone:
one picture more, when all is loaded.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.encoding import ENCODERS, NUM_THREADS, SIZE
from benchmarks.workloads import save_random_model, save_random_weights, write_photographs
from pipeline.captions.records import Record
from pipeline.decoder.model_io import read_model
from pipeline.decoder.soft_attention import DecoderParams
from pipeline.features.encoder import EncodeParams, load_encoder
from pipeline.features.encoding import encode, encoder_spec
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import generate
from pipeline.prediction.captioner import IMAGES_TOGETHER, USUAL_SEARCH, Captioner

PICTURES, ROUNDS = 500, 3
DECODER = DecoderParams(
    embedding_size=256, hidden_size=512, attention_size=256, dropout=0.0, region_dropout=0.0, word_dropout=0.0
)
WORDS = 2500
CPU = torch.device("cpu")


def main(pictures: int = PICTURES, rounds: int = ROUNDS) -> None:
    """Print the seconds of both ways, their ratio, and the milliseconds of a lone picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        records, told = write_photographs(folder / "images", pictures)
        print(f"predicting, {torch.get_num_threads()} threads, {SIZE} px, {pictures} images: {told}")
        print(f"{'':>18} {'encode, s':>10} {'generate, s':>12} {'predict, s':>11} {'ratio':>7} {'lone, ms':>9}")
        for architecture, layer in ENCODERS:
            weights = folder / f"{architecture}.safetensors"
            save_random_weights(architecture, weights)
            params = EncodeParams(
                architecture=architecture,
                layer=layer,
                weights=weights,
                image_size=SIZE,
                precision="float32",
                compile=False,
                views=("whole",),
            )
            spec = encoder_spec(load_encoder(params), params)
            model = save_random_model(folder / architecture, DECODER, spec, WORDS, str(params.weights))
            files = [folder / "images" / record.file for record in records]
            staged(model, records[:IMAGES_TOGETHER], folder, params)
            taken = []
            for _ in range(rounds):
                by_stages = staged(model, records, folder, params)
                began = time.perf_counter()
                captioner = Captioner.load(model, device="cpu", threads=NUM_THREADS)
                captioner.caption(files)
                taken.append((*by_stages, time.perf_counter() - began))
            encoding, generating, predicting = (median(column) for column in zip(*taken, strict=True))
            ratio = median(predicted / (encoded + generated) for encoded, generated, predicted in taken)
            lone = median(milliseconds(captioner, file) for file in files[:10])
            figures = f"{encoding:>10.1f} {generating:>12.1f} {predicting:>11.1f} {ratio:>7.2f} {lone:>9.0f}"
            print(f"{architecture:>18} {figures}", flush=True)


def staged(model: Path, records: Sequence[Record], folder: Path, params: EncodeParams) -> tuple[float, float]:
    """Seconds of `encode` and of `generate`, from an empty work folder on."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as work,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        began = time.perf_counter()
        encode(records, folder / "images", params, Path(work) / "work", Path(work) / "features", CPU, NUM_THREADS)
        encoded = time.perf_counter()
        store = FeatureStore(Path(work) / "features")
        found = list(generate([read_model(model)], store, store.image_ids, USUAL_SEARCH, IMAGES_TOGETHER, CPU))
        assert len(found) == len(records)
        return encoded - began, time.perf_counter() - encoded


def milliseconds(captioner: Captioner, file: Path) -> float:
    began = time.perf_counter()
    captioner.caption([file])
    return 1000 * (time.perf_counter() - began)
