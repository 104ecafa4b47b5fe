"""Speed of prediction: `gridcap predict` against stages `encode` and `generate`.

Both load a model folder and the encoder's weights and caption the same image files with the default search settings.
The stages write a feature store in between; `gridcap predict` writes no files. Weights are random, so captions have the
maximum length. Every round measures each once; seconds and their ratio are medians over rounds. The last column is the
latency of one image with a loaded captioner.
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
from benchmarks.workloads import (
    decoder_params,
    encode_params,
    make_vocabulary,
    save_random_model,
    save_random_weights,
    write_photographs,
)
from pipeline.captions.records import Record
from pipeline.decoder.model_io import read_model
from pipeline.features.encoder import EncodeParams, load_encoder
from pipeline.features.encoding import encode, encoder_spec
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import generate
from pipeline.prediction.captioner import DEFAULT_SEARCH, SEARCH_BATCH_SIZE, Captioner

NUM_IMAGES, ROUNDS = 500, 3
DECODER = decoder_params(embedding_size=256, hidden_size=512, attention_size=256)
VOCAB_SIZE = 2500
CPU = torch.device("cpu")


def main(num_images: int = NUM_IMAGES, rounds: int = ROUNDS) -> None:
    """Print a table with a row for each encoder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        records, description = write_photographs(folder / "images", num_images)
        print(f"predicting, {torch.get_num_threads()} threads, {SIZE} px, {num_images} images: {description}")
        print(f"{'':>18} {'encode, s':>10} {'generate, s':>12} {'predict, s':>11} {'ratio':>7} {'one image, ms':>14}")
        for architecture, layer in ENCODERS:
            weights = folder / f"{architecture}.safetensors"
            save_random_weights(architecture, weights)
            params = encode_params(architecture, layer, weights, SIZE)
            spec = encoder_spec(load_encoder(params), params)
            model = save_random_model(
                folder / architecture, DECODER, spec, make_vocabulary(VOCAB_SIZE), str(params.weights)
            )
            print(f"{architecture:>18} {measure(model, records, folder, params, rounds)}", flush=True)


def measure(model: Path, records: Sequence[Record], folder: Path, params: EncodeParams, rounds: int) -> str:
    """Measure the stages and the captioner on the same images and return a row of the table."""
    files = [folder / "images" / record.file for record in records]
    run_stages(model, records[:SEARCH_BATCH_SIZE], folder, params)  # warm-up
    times = []
    for _ in range(rounds):
        encode_seconds, generate_seconds = run_stages(model, records, folder, params)
        start = time.perf_counter()
        captioner = Captioner.load(model, device="cpu", num_threads=NUM_THREADS)
        captioner.caption(files)
        times.append((encode_seconds, generate_seconds, time.perf_counter() - start))
    encode_median, generate_median, predict_median = (median(column) for column in zip(*times, strict=True))
    ratio = median(
        predict_seconds / (encode_seconds + generate_seconds)
        for encode_seconds, generate_seconds, predict_seconds in times
    )
    latency = median(milliseconds(captioner, file) for file in files[:10])
    return f"{encode_median:>10.1f} {generate_median:>12.1f} {predict_median:>11.1f} {ratio:>7.2f} {latency:>14.0f}"


def run_stages(model: Path, records: Sequence[Record], folder: Path, params: EncodeParams) -> tuple[float, float]:
    """Measure the seconds of `encode` and of `generate`, starting from an empty work folder."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as work,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        start = time.perf_counter()
        with encode(records, folder / "images", params, Path(work), CPU, NUM_THREADS) as result:
            store = FeatureStore(result.store)
        encoded = time.perf_counter()
        models = [read_model(model)]
        generated = list(generate(models, store, store.image_ids, DEFAULT_SEARCH, SEARCH_BATCH_SIZE, CPU))
        assert len(generated) == len(records)
        return encoded - start, time.perf_counter() - encoded


def milliseconds(captioner: Captioner, file: Path) -> float:
    """Measure the milliseconds of captioning one image."""
    start = time.perf_counter()
    captioner.caption([file])
    return 1000 * (time.perf_counter() - start)
