"""Speed of beam search: images captioned per second, against a textbook implementation with the same decoder.

textbook: search as in public implementations of the paper. Images are captioned one by one, each caption of the beam
has its own copy of the regions, and the regions are projected again at every step
(`pipeline/decoder/soft_attention_reference.py`).
gridcap: `caption_grids` on batches of images, in float32 and bfloat16.

The beam size is 5. Decoders have random weights, except for a few that end captions after about 12 words, depending on
the image. In float32 both must find the same captions; the last column is the share of equal captions. Every round
measures each system once. Rates and ratios are medians over rounds; min and max are the extreme ratios of a round.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import mean, median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.processor import describe_device, supports
from benchmarks.training import describe_target, measure
from benchmarks.workloads import decoder_params
from pipeline.captions.vocabulary import END, PAD, SPECIALS, START, UNK
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.decoder.soft_attention_reference import ReferenceState, SoftAttentionReference
from pipeline.device import setup_device
from pipeline.generation.ensemble import caption_grids, precompute
from pipeline.generation.search import SearchParams

HIDDEN_SIZE, BEAM_SIZE, MEAN_LENGTH, STD_LENGTH = 512, 5, 12, 3
SIZES = decoder_params(embedding_size=HIDDEN_SIZE, hidden_size=HIDDEN_SIZE, attention_size=HIDDEN_SIZE)
SEARCH = replace(SearchParams.greedy(max_length=30), beam_size=BEAM_SIZE)
NUM_TEXTBOOK_IMAGES, NUM_IMAGES, BATCH_SIZE, ROUNDS = 8, 128, 64, 5
TARGET_RATIO = 8.0

TEXTBOOK = "textbook"

Precision = Literal["float32", "bfloat16"]
PRECISIONS: Sequence[Precision] = ("float32", "bfloat16")
Words = tuple[str, ...]


class Case(NamedTuple):
    """Sizes of the grid and the vocabulary."""

    side: int
    """Height and width of the grid."""
    num_channels: int
    vocab_size: int


CASES = [Case(14, 256, 1100), Case(7, 2048, 2500)]


def main(rounds: int = ROUNDS) -> None:
    """Print the tables of all cases."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    print(
        f"searching on {describe_device(device)}: beam size {BEAM_SIZE}; "
        f"hidden, embedding and attention size {HIDDEN_SIZE}; batches of {BATCH_SIZE} images; median of {rounds} rounds"
    )
    for case in CASES:
        for line in compare(case, device, rounds):
            print(line, flush=True)


def compare(case: Case, device: torch.device, rounds: int, target: float = TARGET_RATIO) -> Iterator[str]:
    """Measure one case and yield the lines of its table."""
    torch.manual_seed(0)
    grids = torch.rand(NUM_IMAGES, case.side**2, case.num_channels).half().to(device)  # [B, P, C]
    grid = (case.side, case.side)
    decoder = SoftAttentionDecoder(SIZES, grid, case.num_channels, case.vocab_size).to(device).eval()
    make_captions_end(decoder, case.side**2)
    textbook = SoftAttentionReference(decoder).to(device).eval()
    words = vocabulary(case.vocab_size)

    precisions = [precision for precision in PRECISIONS if supports(precision, device)]
    textbook_grids = grids[:NUM_TEXTBOOK_IMAGES]
    expected = [textbook_search(textbook, words, grid) for grid in textbook_grids]
    same = {
        precision: mean(map(tuple.__eq__, batched_search(decoder, words, textbook_grids, precision), expected))
        for precision in precisions
    }
    assert same["float32"] >= 0.9, "both must find the same captions, except for ties"
    times = [
        {
            TEXTBOOK: measure(lambda: [textbook_search(textbook, words, grid) for grid in textbook_grids], 1, device)
            / NUM_TEXTBOOK_IMAGES,
            **{
                precision: measure(partial(batched_search, decoder, words, grids, precision), 1, device) / NUM_IMAGES
                for precision in precisions
            },
        }
        for _ in range(rounds)
    ]
    ratios = {precision: sorted(row[TEXTBOOK] / row[precision] for row in times) for precision in precisions}

    heading = f"{case.side**2} x {case.num_channels}, {case.vocab_size} words"
    yield f"{heading:>24} {'images/s':>9} {'x textbook':>11} {'min':>6} {'max':>6} {'target':>9} {'same captions':>14}"
    yield f"{'textbook, float32':>24} {median(1 / row[TEXTBOOK] for row in times):>9.1f}"
    for precision in precisions:
        ratio = median(ratios[precision])
        yield (
            f"{f'gridcap, {precision}':>24} {median(1 / row[precision] for row in times):>9.1f} {ratio:>11.2f} "
            f"{ratios[precision][0]:>6.2f} {ratios[precision][-1]:>6.2f} "
            f"{describe_target(target, ratio):>9} {same[precision]:>14.0%}"
        )
    yield f"{'best mode':>24} {max(precisions, key=lambda precision: median(ratios[precision]))}"
    for precision in set(PRECISIONS) - set(precisions):
        yield f"{f'gridcap, {precision}':>24} skipped: this processor has no {precision} instructions"
    lengths = [len(caption_words) for caption_words in batched_search(decoder, words, grids, "float32")]
    yield f"{'':>24} captions of {mean(lengths):.1f} words, from {min(lengths)} to {max(lengths)}"


@torch.no_grad()
def make_captions_end(decoder: SoftAttentionDecoder, num_regions: int) -> None:
    """Let one element of the cell state count words, and make `<end>` likely once it reaches `MEAN_LENGTH`.

    The initial count depends on the image, so that lengths have a standard deviation of `STD_LENGTH`.

    Args:
        decoder: Decoder to modify.
        num_regions: Number of regions, P.
    """
    attention_size, step = len(decoder.score_weight), 0.75 / MEAN_LENGTH
    counter = decoder.init_c.out_features * torch.arange(4)  # input, forget, cell and output gate of the element
    gates = attention_size + 2 + counter
    for layer, rows in ((decoder.state_proj, gates), (decoder.word_proj, gates), (decoder.context_proj, counter)):
        layer.weight[rows] = 0
    decoder.state_proj.bias[gates] = torch.tensor([20, 20, math.atanh(step), 20]).to(decoder.score_weight)
    # The mean of `num_regions` regions, whose channels have a standard deviation of 1.
    decoder.init_c.weight[0] *= STD_LENGTH * step * (3 * num_regions) ** 0.5
    decoder.init_c.bias[0] = 0

    decoder.embedding.weight[:, 0] = 0
    decoder.context_output.weight[0] = 0
    decoder.state_output.weight[0] = 0
    decoder.state_output.weight[0, 0], decoder.state_output.bias[0] = 6, -6 * math.tanh(0.75)
    decoder.output_proj.weight *= 3
    decoder.output_proj.weight[:, 0] = 0
    decoder.output_proj.weight[END, 0] = 12


def vocabulary(vocab_size: int) -> Words:
    """Return a vocabulary of artificial words."""
    return (*SPECIALS, *(f"word{index}" for index in range(len(SPECIALS), vocab_size)))


def batched_search(decoder: SoftAttentionDecoder, words: Words, grids: Tensor, precision: Precision) -> list[Words]:
    """Return the best caption of each image by gridcap's search."""
    search = replace(SEARCH, precision=precision)
    word_projections = precompute([decoder], search)
    captions = [
        caption_grids([decoder], words, batch, range(len(batch)), search, word_projections)
        for batch in torch.split(grids, BATCH_SIZE)
    ]
    return [best.words for best, *_ in chain.from_iterable(captions)]


class Beam(NamedTuple):
    """A caption in the beam of the textbook's search."""

    log_probability: float
    tokens: tuple[int, ...]
    row: int
    """Row of the caption that it continues."""


@torch.inference_mode()
def textbook_search(textbook: SoftAttentionReference, words: Words, grid: Tensor) -> Words:
    """Return the best caption of one image by the textbook's search."""
    regions = textbook.prepare(grid.unsqueeze(0)).expand(BEAM_SIZE, -1, -1)
    state = textbook.init_state(regions)
    tokens = torch.full((BEAM_SIZE,), START, device=grid.device)
    beams = [Beam(0.0, (), 0)]  # all rows are still equal
    for _ in range(SEARCH.max_length):
        active = [beam for beam in beams if END not in beam.tokens]
        if not active:
            break
        logits, state, _ = textbook.decode_step(tokens, state, regions[: len(tokens)])
        log_probs = logits.log_softmax(dim=-1)
        log_probs[:, [PAD, START, UNK]] = -torch.inf
        totals = torch.tensor([beam.log_probability for beam in active], device=grid.device).unsqueeze(1)
        totals = totals + log_probs[: len(active)]
        best, indices = totals.flatten().topk(BEAM_SIZE)
        for total, index in zip(best.tolist(), indices.tolist(), strict=True):
            row, token = divmod(index, log_probs.shape[1])
            beams.append(Beam(total, (*active[row].tokens, token), row))
        beams = sorted((beam for beam in beams if beam not in active), reverse=True)[:BEAM_SIZE]
        rows = [beam.row for beam in beams if END not in beam.tokens]
        tokens = torch.tensor([beam.tokens[-1] for beam in beams if END not in beam.tokens], device=grid.device).long()
        state = ReferenceState(*(values[rows] for values in state))
    return tuple(words[token] for token in beams[0].tokens if token != END)
