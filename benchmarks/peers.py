"""Speed of gridcap compared with two public implementations, imported from checkouts of their repositories.

Every round trains and searches with each system in turn, on the same batches and at the same sizes. Rates and ratios
are medians over the rounds; a ratio is taken within its round. `benchmarks/peers.md` says how to get the checkouts,
what is run, and what is not comparable.
"""

import argparse
import contextlib
import copy
import importlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import stages  # noqa: F401  # sets GOMP_SPINCOUNT
from benchmarks.processor import describe_device, supports
from benchmarks.searching import BEAM_SIZE, MEAN_LENGTH, SEARCH, make_captions_end, vocabulary
from benchmarks.training import (
    CAPTION_LENGTH,
    CAPTIONS_PER_IMAGE,
    CASES,
    LEARNING_RATE,
    MODES,
    NUM_CAPTIONS,
    NUM_IMAGES,
    SIZE,
    Case,
    can_compile,
    measure,
    train_step,
)
from benchmarks.workloads import decoder_params
from pipeline.captions.vocabulary import END
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.registry import build_decoder
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.device import setup_device
from pipeline.generation.ensemble import caption_grids, precompute
from pipeline.generation.search import SearchParams

ROUNDS = 5
MAX_LENGTH = 20
"""Maximum words of a caption: the default of ruotianluo's repository."""
NUM_SEARCHED, SEARCH_BATCH_SIZE = 64, 64
NUM_SEARCHED_ALONE = 8
"""Images that a system which searches image by image captions in a round."""
DROPOUT = 0.5


class Batch(NamedTuple):
    """What all systems train on and caption."""

    case: Case
    grids: Tensor
    """Grids to train on, float16 [B, P, C]."""
    tokens: Tensor
    """Token ids [B, K, T + 1]."""
    searched: Tensor
    """Grids to caption, float16."""

    @property
    def expanded(self) -> Tensor:
        """Grids to train on with a copy for each caption, float32 [B * K, P, C]."""
        return self.grids.float().repeat_interleave(CAPTIONS_PER_IMAGE, dim=0)


class System(NamedTuple):
    """A system with a function for each measurement."""

    name: str
    train: Callable[[], object]
    """Performs one training step."""
    search: Callable[[], object] | None = None
    """Captions `num_searched` images, if the system searches at all."""
    num_searched: int = NUM_SEARCHED


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=f"checkout of {PEERS[name].repository}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="rounds (default: %(default)s)")
    options = parser.parse_args(arguments)
    checkouts = {}
    for name, peer in PEERS.items():
        folder = getattr(options, name)
        if folder is not None and (folder / peer.file).is_file():
            checkouts[name] = folder.resolve()
        else:
            reason = "no folder was given" if folder is None else f"{folder} has no file {peer.file}"
            print(f"{peer.repository} is skipped: {reason}. Pass a checkout as --{name} FOLDER.")
    if not checkouts:
        return
    device = setup_device(os.environ.get("GRIDCAP_DEVICE", "auto"))
    print(
        f"peers on {describe_device(device)}: batches of {NUM_IMAGES} images x {CAPTIONS_PER_IMAGE} captions x"
        f" {CAPTION_LENGTH} words; attention, embedding and hidden size {SIZE}; beam size {BEAM_SIZE}, at most"
        f" {MAX_LENGTH} words; median of {options.rounds} rounds"
    )
    for case in CASES:
        for line in compare(case, checkouts, device, options.rounds):
            print(line, flush=True)


def compare(case: Case, checkouts: dict[str, Path], device: torch.device, rounds: int) -> Iterator[str]:
    """Measure one case and yield the lines of its table."""
    torch.manual_seed(0)
    shape = (case.side**2, case.num_channels)
    batch = Batch(
        case=case,
        grids=torch.rand(NUM_IMAGES, *shape).half().to(device),
        tokens=torch.randint(4, case.vocab_size, (NUM_IMAGES, CAPTIONS_PER_IMAGE, CAPTION_LENGTH + 1)).to(device),
        searched=torch.rand(NUM_SEARCHED, *shape).half().to(device),
    )
    ours = list(gridcap_systems(batch, device))
    peers = [system for name, folder in checkouts.items() for system in PEERS[name].build(folder, batch, device)]
    systems = [*peers, *ours]
    for system in systems:  # compiles, and allocates memory
        system.train()
    trained = [
        {system.name: measure(system.train, 1, device) / NUM_CAPTIONS for system in systems} for _ in range(rounds)
    ]
    searching = [system for system in systems if system.search]
    searched = [
        {system.name: measure(system.search, 1, device) / system.num_searched for system in searching if system.search}
        for _ in range(rounds)
    ]
    yield f"{case.side**2} regions x {case.num_channels}, {case.vocab_size} words"
    for title, seconds, measured in (
        ("training, captions/s", trained, systems),
        ("search, images/s", searched, searching),
    ):
        columns = [peer.name for peer in peers]
        yield f"{title:>40} {'':>9} " + " ".join(f"{f'/ {name}':>22}" for name in columns)
        for system in measured:
            ratios = [median(row[column] / row[system.name] for row in seconds) for column in columns]
            yield (
                f"{system.name:>40} {median(1 / row[system.name] for row in seconds):>9.1f} "
                + " ".join(f"{ratio:>22.2f}" for ratio in ratios)
            )


def gridcap_systems(batch: Batch, device: torch.device) -> Iterator[System]:
    """Yield gridcap's decoders, trained and searched as its stages do."""
    case = batch.case
    kinds: list[DecoderKind] = ["soft_attention", "top_down"]
    for kind in kinds:
        params = decoder_params(SIZE, SIZE, SIZE, dropout=DROPOUT, kind=kind)
        for mode in MODES:
            if mode.compiled and (kind != kinds[0] or not can_compile(device)):
                continue
            if not supports(mode.precision, device):
                continue
            decoder = build_decoder(params, (case.side, case.side), case.num_channels, case.vocab_size).to(device)
            decoder.compiled = mode.compiled
            optimizer = torch.optim.Adam(decoder.parameters(), lr=LEARNING_RATE, fused=True)
            name = f"gridcap {kind}, {mode.name.removeprefix('decoder, ')}"
            step = train_step(decoder.train(), optimizer, batch.grids, batch.tokens, mode.precision)
            searched = build_decoder(params, (case.side, case.side), case.num_channels, case.vocab_size).to(device)
            if isinstance(searched, SoftAttentionDecoder):
                make_captions_end(searched, case.side**2)
            search = replace(SEARCH, precision=mode.precision, max_length=MAX_LENGTH)
            run = partial(search_batches, searched.eval(), vocabulary(case.vocab_size), batch.searched, search)
            yield System(name, step, None if mode.compiled else run)


def search_batches(decoder: Decoder, words: Sequence[str], grids: Tensor, search: SearchParams) -> list[object]:
    """Caption images in batches."""
    projections = precompute([decoder], search)
    batches = torch.split(grids, SEARCH_BATCH_SIZE)
    return list(
        chain.from_iterable(
            caption_grids([decoder], words, batch, range(len(batch)), search, projections) for batch in batches
        )
    )


def sgrvinod_systems(folder: Path, batch: Batch, device: torch.device) -> Iterator[System]:
    """Yield the decoder of sgrvinod's tutorial, trained by its `train.train`, searched by its `caption` module."""
    case = batch.case
    # Modules that read images and score captions.
    unused: dict[str, dict[str, Any]] = {
        "scipy.misc": {"imread": lambda _: np.zeros((1, 1, 3)), "imresize": lambda image, _: image},
        "skimage.transform": {},
        "nltk.translate.bleu_score": {"corpus_bleu": None},
    }
    with importable(folder, unused):
        models: Any = importlib.import_module("models")
        train: Any = importlib.import_module("train")
        caption: Any = importlib.import_module("caption")
    for module in (models, train, caption):
        module.device = device
    # Its code takes a packed sequence for a pair and divides integers to integers, as PyTorch did when it was written.
    train.pack_padded_sequence = lambda *args, **kwargs: pack_padded_sequence(*args, **kwargs)[:2]

    decoder = models.DecoderWithAttention(SIZE, SIZE, SIZE, case.vocab_size, case.num_channels, DROPOUT).to(device)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=train.decoder_lr)
    grids = batch.expanded.view(-1, case.side, case.side, case.num_channels)  # [B * K, H, W, C]
    captions = batch.tokens.flatten(0, 1)
    lengths = torch.full((len(captions), 1), captions.shape[1], device=device)
    criterion = nn.CrossEntropyLoss().to(device)

    def train_once() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train.train([(grids, captions, lengths)], nn.Identity(), decoder, criterion, None, optimizer, 0)

    searched = models.DecoderWithAttention(SIZE, SIZE, SIZE, case.vocab_size, case.num_channels).to(device).eval()
    words = {word: i for i, word in enumerate(vocabulary(case.vocab_size))}
    end_captions(searched)

    def search_all() -> None:
        with torch.no_grad(), patch.object(Tensor, "__truediv__", divide):
            for grid in batch.searched[:NUM_SEARCHED_ALONE].float():
                image = grid.view(1, case.side, case.side, case.num_channels)
                caption.caption_image_beam_search(lambda _: image, searched, "", words, BEAM_SIZE)  # noqa: B023

    yield System("sgrvinod", train_once, search_all, NUM_SEARCHED_ALONE)


def divide(dividend: Tensor, divisor: Any) -> Tensor:
    """Divide integers to integers, as PyTorch did before 1.5."""
    floor = not dividend.is_floating_point() and isinstance(divisor, int)
    return torch.div(dividend, divisor, rounding_mode="floor" if floor else None)


@torch.no_grad()
def end_captions(decoder: Any) -> None:
    """Make captions of sgrvinod's decoder end after about `MEAN_LENGTH` words: one element of its state counts them."""
    gates = SIZE * torch.arange(4)  # of the counting element: input, forget, candidate and output gate
    for weight in (decoder.decode_step.weight_ih, decoder.decode_step.weight_hh):
        weight[gates] = 0
    step = 0.75 / MEAN_LENGTH
    decoder.decode_step.bias_ih[gates] = torch.tensor([20, 20, math.atanh(step), 20]).to(decoder.fc.weight)
    decoder.decode_step.bias_hh[gates] = 0
    for layer in (decoder.init_h, decoder.init_c):
        layer.weight[0] = layer.bias[0] = 0
    decoder.fc.weight[:, 0] = 0
    decoder.fc.weight[END] = 0
    decoder.fc.weight[END, 0], decoder.fc.bias[END] = 200, -200 * math.tanh(0.75) + 8


def ruotianluo_systems(folder: Path, batch: Batch, device: torch.device) -> Iterator[System]:
    """Yield Att2in2 and UpDown of ruotianluo's repository, trained as its `tools/train.py` does."""
    case = batch.case
    # Of a settings file, which the benchmark does not have.
    unused = {"yacs.config": {"CfgNode": type("CfgNode", (dict,), {"merge_from_list": lambda *_: None})}}
    with importable(folder, unused), contextlib.redirect_stdout(io.StringIO()):  # says what its other models lack
        models = importlib.import_module("captioning.models")
        options = importlib.import_module("captioning.utils.opts")
        misc = importlib.import_module("captioning.utils.misc")
        wrapper = importlib.import_module("captioning.modules.loss_wrapper")
        with patch.object(sys, "argv", ["train.py"]):
            defaults = options.parse_opt()
    for model_name in ("att2in2", "updown"):
        sizes = dict.fromkeys(("rnn_size", "input_encoding_size", "att_hid_size"), SIZE)
        channels = dict.fromkeys(("fc_feat_size", "att_feat_size"), case.num_channels)
        opt = copy.copy(defaults)
        vars(opt).update(sizes, **channels, caption_model=model_name, drop_prob_lm=DROPOUT, max_length=MAX_LENGTH)
        opt.vocab_size = case.vocab_size - 1  # without id 0, which starts, ends and pads captions
        opt.seq_length = CAPTION_LENGTH
        opt.vocab = {str(i): f"word{i}" for i in range(1, case.vocab_size)}
        model = models.setup(opt).to(device)
        loss_model = wrapper.LossWrapper(model, opt)
        grids = batch.grids.float()
        labels = batch.tokens.clone()  # [B, K, T + 1]
        labels[:, :, [0, -1]] = 0
        masks = torch.ones(labels.shape, device=device)
        inputs = (grids.mean(dim=1), grids, labels, masks, None)
        yield System(
            f"ruotianluo {model_name}",
            partial(train_ruotianluo, loss_model, misc.build_optimizer(model.parameters(), opt), inputs),
            partial(search_ruotianluo, model, batch.searched.float()),
        )


def train_ruotianluo(loss_model: Any, optimizer: torch.optim.Optimizer, inputs: Sequence[Tensor | None]) -> None:
    """Perform a training step of a model of ruotianluo's repository.

    Args:
        loss_model: Its `LossWrapper`.
        optimizer: Its optimizer.
        inputs: Mean and regions of the grids, labels, their masks, and masks of the regions or None.
    """
    loss_model.train()
    optimizer.zero_grad()
    references = [None] * NUM_IMAGES  # of self-critical training
    flags = {"sc_flag": False, "struc_flag": False, "drop_worst_flag": False}
    loss = loss_model(*inputs, references, torch.arange(NUM_IMAGES), **flags)["loss"].mean()
    loss.backward()
    clip = getattr(nn.utils, f"clip_grad_{loss_model.opt.grad_clip_mode}_")
    clip(loss_model.parameters(), loss_model.opt.grad_clip_value)
    optimizer.step()
    loss.item()


@torch.no_grad()
def search_ruotianluo(model: Any, grids: Tensor) -> None:
    """Caption grids [B, P, C] with a model of ruotianluo's repository."""
    model.eval()
    for part in torch.split(grids, SEARCH_BATCH_SIZE):
        model(part.mean(dim=1), part, None, opt={"beam_size": BEAM_SIZE, "sample_n": 1}, mode="sample")


@contextlib.contextmanager
def importable(folder: Path, unused: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Make the top-level modules of a checkout importable, and forget them and the stand-ins afterwards.

    Args:
        folder: The checkout.
        unused: Names of modules that its modules import and the benchmark does not need, with the attributes that they
            import from them. Empty modules stand in for these and for their packages.
    """
    stand_ins: dict[str, ModuleType] = {}
    for name, attributes in unused.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            stand_ins.setdefault(".".join(parts[:end]), ModuleType(parts[end - 1]))
        vars(stand_ins[name]).update(attributes)
    replaced = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    with patch.object(sys, "path", [str(folder), *sys.path]), warnings.catch_warnings(action="ignore"):
        sys.modules.update(stand_ins)
        try:
            yield
        finally:
            for name, module in list(sys.modules.items()):
                if name in stand_ins or folder in Path(getattr(module, "__file__", None) or "/").parents:
                    del sys.modules[name]
            sys.modules.update(replaced)


class Peer(NamedTuple):
    """A repository."""

    repository: str
    file: str
    """A file of every checkout."""
    build: Callable[[Path, Batch, torch.device], Iterator[System]]


PEERS = {
    "sgrvinod": Peer("sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning", "caption.py", sgrvinod_systems),
    "ruotianluo": Peer("ruotianluo/ImageCaptioning.pytorch", "captioning/models/AttModel.py", ruotianluo_systems),
}


if __name__ == "__main__":
    main()
