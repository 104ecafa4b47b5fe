"""Images captioned a second by beam search: ours beside a textbook's, of the same decoder, in one run.

textbook: what public implementations of the paper do. Images are taken one at a time; each caption of the beam is a row
with its image's regions, and projects them anew at every word (`pipeline/decoder/soft_attention_reference.py`).
ours: `caption` in batches of the stage's size, in either precision.

The beam is 5. Decoders have random weights, but for a few that end captions after about as many words as people use, a
number that depends on the image. In float32 both searches have to find the same captions; bfloat16 finds the share of
them that is told. Rounds take all in turn. Rates are medians of the rounds, and so are ratios, each taken within its
round; from and to are the lowest and the highest.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import mean, median
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.captions.vocabulary import END, PAD, START, UNK
from pipeline.decoder.soft_attention import DecoderParams, SoftAttentionDecoder
from pipeline.decoder.soft_attention_reference import ReferenceState, SoftAttentionReference
from pipeline.device import setup_device
from pipeline.generation.ensemble import caption, precompute
from pipeline.generation.search import SearchParams

SIZE, BEAM, LENGTH, SPREAD = 512, 5, 12, 3
SIZES = DecoderParams(
    embedding_size=SIZE, hidden_size=SIZE, attention_size=SIZE, dropout=0.0, region_dropout=0.0, word_dropout=0.0
)
SEARCH = replace(SearchParams.greedy(max_length=30), beam_size=BEAM)
SINGLE_PROCESS, TOGETHER, BATCH, ROUNDS = 8, 128, 64, 5
ASKED = 8.0

TEXTBOOK = "textbook"

Mode = Literal["float32", "bfloat16"]
MODES: Sequence[Mode] = ("float32", "bfloat16")
Words = tuple[int, ...]


class Case(NamedTuple):
    """Grids and a vocabulary."""

    side: int
    channels: int
    words: int


CASES = [Case(14, 256, 1100), Case(7, 2048, 2500)]


def main(rounds: int = ROUNDS) -> None:
    """Print the tables of all cases."""
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"searching on {device}, {named}: a beam of {BEAM}; state, embedding and attention of {SIZE}; ours in batches "
        f"of {BATCH} images; median of {rounds} rounds"
    )
    for case in CASES:
        for line in compared(case, device, rounds):
            print(line, flush=True)


def compared(case: Case, device: torch.device, rounds: int) -> Iterator[str]:
    """The lines of one case."""
    torch.manual_seed(0)
    grids = torch.rand(TOGETHER, case.side**2, case.channels).half().to(device)
    decoder = SoftAttentionDecoder(SIZES, (case.side, case.side), case.channels, case.words).to(device).eval()
    make_captions_end(decoder, case.side**2)
    textbook = SoftAttentionReference(decoder).to(device).eval()

    wanted = [search_alone(textbook, grid) for grid in grids[:SINGLE_PROCESS]]
    alike = {
        mode: mean(map(tuple.__eq__, search_together(decoder, grids[:SINGLE_PROCESS], mode), wanted)) for mode in MODES
    }
    assert alike["float32"] >= 0.9, "both are to find the same captions, but where two are equally likely"
    taken = [
        {
            TEXTBOOK: seconds(lambda: [search_alone(textbook, grid) for grid in grids[:SINGLE_PROCESS]], device)
            / SINGLE_PROCESS,
            **{mode: seconds(partial(search_together, decoder, grids, mode), device) / TOGETHER for mode in MODES},
        }
        for _ in range(rounds)
    ]
    ratios = {mode: sorted(times[TEXTBOOK] / times[mode] for times in taken) for mode in MODES}

    heading = f"{case.side**2} x {case.channels}, {case.words} words"
    yield f"{heading:>24} {'images/s':>9} {'x textbook':>11} {'from':>6} {'to':>6} {'asked':>9} {'same captions':>14}"
    yield f"{'textbook, float32':>24} {median(1 / times[TEXTBOOK] for times in taken):>9.1f}"
    for mode in MODES:
        gain = median(ratios[mode])
        bar = f"{ASKED:g} {'met' if gain >= ASKED else 'missed'}"
        yield (
            f"{f'ours, {mode}':>24} {median(1 / times[mode] for times in taken):>9.1f} {gain:>11.2f} "
            f"{ratios[mode][0]:>6.2f} {ratios[mode][-1]:>6.2f} {bar:>9} {alike[mode]:>14.0%}"
        )
    lengths = [len(words) for words in search_together(decoder, grids, "float32")]
    yield f"{'':>24} captions of {mean(lengths):.1f} words, from {min(lengths)} to {max(lengths)}"


@torch.no_grad()
def make_captions_end(decoder: SoftAttentionDecoder, regions: int) -> None:
    """Give one number of the state to counting, and make `<end>` ever likelier as it nears `LENGTH` words.

    Where it starts from depends on the image: `SPREAD` words is the standard deviation.
    """
    size, a_word = len(decoder.score_weight), 0.75 / LENGTH
    counter = decoder.init_c.out_features * torch.arange(4)  # its entry, forget, candidate and output gate
    gates = size + 2 + counter
    for layer, rows in ((decoder.state_proj, gates), (decoder.word_proj, gates), (decoder.context_proj, counter)):
        layer.weight[rows] = 0
    decoder.state_proj.bias[gates] = torch.tensor([20, 20, math.atanh(a_word), 20]).to(decoder.score_weight)
    # A mean of so many regions, whose channels have a deviation of 1, by weights of a deviation of 1 together.
    decoder.init_c.weight[0] *= SPREAD * a_word * (3 * regions) ** 0.5
    decoder.init_c.bias[0] = 0

    decoder.embedding.weight[:, 0] = 0
    decoder.context_output.weight[0] = 0
    decoder.state_output.weight[0] = 0
    decoder.state_output.weight[0, 0], decoder.state_output.bias[0] = 6, -6 * math.tanh(0.75)
    decoder.output_proj.weight *= 3
    decoder.output_proj.weight[:, 0] = 0
    decoder.output_proj.weight[END, 0] = 12


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def search_together(decoder: SoftAttentionDecoder, grids: Tensor, precision: Mode) -> list[Words]:
    """Ours: each image's best caption."""
    search = replace(SEARCH, precision=precision)
    asked = precompute([decoder], search)
    found = [caption([decoder], part, range(len(part)), search, asked) for part in torch.split(grids, BATCH)]
    return [best.words for best, *_ in chain.from_iterable(found)]


class Candidate(NamedTuple):
    """A caption in the making, or one that has ended."""

    total: float
    words: Words
    row: int
    """Of the caption that it continues."""


@torch.inference_mode()
def search_alone(textbook: SoftAttentionReference, grid: Tensor) -> Words:
    """The textbook's: the best caption of one image."""
    regions = textbook.prepare(grid.unsqueeze(0)).expand(BEAM, -1, -1)
    state = textbook.init_state(regions)
    words = torch.full((BEAM,), START, device=grid.device)
    beam = [Candidate(0.0, (), 0)]  # at first all rows are alike
    for _ in range(SEARCH.max_length):
        going = [one for one in beam if END not in one.words]
        if not going:
            break
        logits, state, _ = textbook.decode_step(words, state, regions[: len(words)])
        gains = logits.log_softmax(dim=-1)
        gains[:, [PAD, START, UNK]] = -torch.inf
        totals = torch.tensor([one.total for one in going], device=grid.device).unsqueeze(1) + gains[: len(going)]
        best, places = totals.flatten().topk(BEAM)
        for total, place in zip(best.tolist(), places.tolist(), strict=True):
            row, word = divmod(place, gains.shape[1])
            beam.append(Candidate(total, (*going[row].words, word), row))
        beam = sorted((one for one in beam if one not in going), reverse=True)[:BEAM]
        rows = [one.row for one in beam if END not in one.words]
        words = torch.tensor([one.words[-1] for one in beam if END not in one.words], device=grid.device).long()
        state = ReferenceState(*(values[rows] for values in state))
    return tuple(word for word in beam[0].words if word != END)
