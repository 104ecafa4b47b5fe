"""The embedded dataset's own encoder: a ResNet-18 up to `layer3`, taught by what rendered scenes show.

It stands in for ImageNet weights, which have to be fetched. Every cell of the grid learns to tell the body in
front of it, or that there is none: features that say what is where, or else attention could not be judged by
where it lies.

N lessons, B lessons a batch, S side of the picture in px, H and W grid height and width, P = H * W regions,
C channels, A attributes.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipeline.artifacts import file_digest, fingerprint, publish, work_folder, write_atomically
from pipeline.errors import UserError
from pipeline.features.encoder import (
    STRIDES,
    Architecture,
    EncodeParams,
    GridEncoder,
    Layer,
    encode_grids,
    load_encoder,
)
from pipeline.features.images import normalize
from pipeline.import_graph import code_digest
from pipeline.params import params_section, to_plain
from pipeline.scenes.dataset import RenderParams
from pipeline.scenes.examples import (
    ATTRIBUTES,
    BACKGROUND,
    IGNORE,
    Example,
    Pair,
    Purpose,
    SamplingSpec,
    center_cell,
    classes_of,
    draw_lessons,
)
from pipeline.scenes.scene import COLORS, FLOORS, SHAPES

STAGE = "encoder"
CHECKPOINT_FILE = "checkpoint.pt"
WEIGHTS_FILE = "encoder.safetensors"
ARCHITECTURE: Architecture = "resnet18"
LAYER: Layer = "layer3"
STRIDE = STRIDES[LAYER]

_CLASS_COUNTS = [1 + len(values) for values in ATTRIBUTES.values()]
_LESSONS_A_TEST_BATCH = 50

Figures = dict[str, Any]


@params_section
class SceneEncoderParams:
    """Section `encoder`: how the embedded dataset's encoder is taught."""

    seed: Annotated[int, Field(ge=0)]
    """Fixes the lessons, the first weights, the order of batches, flips and brightness."""
    train: Annotated[int, Field(ge=1)]
    """Scenes to learn from, none of them in the dataset and none with a held-out pair."""
    test: Annotated[int, Field(ge=2)]
    """Scenes to read attributes from in the end; every second shows a held-out pair."""
    batch_size: Annotated[int, Field(ge=1)]
    """Scenes that make one step."""
    max_epochs: Annotated[int, Field(ge=1)]
    """Times that every scene is seen."""
    peak_lr: Annotated[float, Field(gt=0)]
    """AdamW's step size at its highest, between the warm-up and the fall to 0 along a cosine."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's pull of the weights towards 0, in learning rates."""
    background_weight: Annotated[float, Field(gt=0)]
    """Weight of a cell without a body in the loss, where a cell with one has 1; such cells are many."""
    brightness_jitter: Annotated[float, Field(ge=0, lt=1)]
    """Pictures are brightened or dimmed by up to this share."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Lessons to train on, in memory."""

    pictures: Tensor
    """uint8 [N, S, S, 3]."""
    classes: Tensor
    """int8 [N, A, H, W]."""
    floors: Tensor
    """int64 [N], places in `FLOORS`."""
    unseen: Tensor
    """bool [1 + colors, 1 + shapes], by classes: pairs that none of the lessons shows."""


class EncoderWithHeads(nn.Module):
    """The encoder with the heads that question it, which are not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = GridEncoder(ARCHITECTURE, LAYER)
        self.cells = nn.Linear(self.encoder.channels, sum(_CLASS_COUNTS))
        self.floor = nn.Linear(self.encoder.channels, len(FLOORS))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def answers(self, regions: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Logits for regions [B, P, C]: of each attribute [B, P, classes], and of the floor [B, floors]."""
        return torch.split(self.cells(regions), _CLASS_COUNTS, dim=-1), self.floor(regions.mean(dim=1))


def train_scene_encoder(
    params: SceneEncoderParams, render: RenderParams, work: Path, out: Path, workers: int
) -> Figures:
    """Render lessons, train, publish the encoder's weights as the file `out`, and tell what can be read from it.

    Weights are float16, under GridEncoder's names; the figures are those of the published file. What a killed
    run learned up to its last whole epoch is taken up from `work`; lessons are rendered again, by `workers`
    processes.

    Raises `UserError` where the pictures' size is no multiple of the stride, and where the loss is not finite.
    """
    if render.size % STRIDE:
        raise UserError(f"render.size must be a multiple of {STRIDE} for the encoder, got {render.size}")
    syllabus = SamplingSpec(seed=params.seed, size=render.size, stride=STRIDE, held_out=render.held_out)
    name = fingerprint(
        params=to_plain(params), syllabus=asdict(syllabus), code=code_digest(__name__), torch=torch.__version__
    )
    with work_folder(work, STAGE, name) as folder:
        lessons = stack(_drawn(syllabus, "train", params.train, workers), render.held_out)
        pupil = train(params, lessons, folder / CHECKPOINT_FILE)
        weights = folder / WEIGHTS_FILE
        write_weights(pupil.encoder, weights)
        figures = evaluate(pupil, weights, _drawn(syllabus, "test", params.test, workers), syllabus)
        publish(weights, out)
        return figures


def stack(lessons: Sequence[Example], held_out: Sequence[Pair]) -> Lessons:
    """Put lessons, none of which shows a pair of `held_out`, side by side for training."""
    unseen = torch.zeros(1 + len(COLORS), 1 + len(SHAPES), dtype=torch.bool)
    for color, shape in held_out:
        unseen[1 + COLORS.index(color), 1 + SHAPES.index(shape)] = True
    return Lessons(
        pictures=torch.from_numpy(np.stack([lesson.picture for lesson in lessons])),
        classes=torch.from_numpy(np.stack([lesson.classes for lesson in lessons])),
        floors=torch.tensor([FLOORS.index(lesson.scene.floor) for lesson in lessons]),
        unseen=unseen,
    )


def train(params: SceneEncoderParams, lessons: Lessons, checkpoint: Path) -> EncoderWithHeads:
    """Train from scratch, or from where the file `checkpoint` stands; it is written after every epoch.

    Raises `UserError` where the loss is not finite.
    """
    torch.manual_seed(params.seed)
    pupil = EncoderWithHeads()
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=params.peak_lr, weight_decay=params.weight_decay)
    first = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        pupil.load_state_dict(saved["pupil"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epochs"]
    pupil.train()
    for epoch in range(first, params.max_epochs):
        _run_epoch(params, pupil, optimizer, lessons, epoch)
        file = io.BytesIO()
        torch.save({"pupil": pupil.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}, file)
        write_atomically(checkpoint, file.getvalue())
    return pupil.eval()


def caption_loss(
    pupil: EncoderWithHeads, images: Tensor, classes: Tensor, floors: Tensor, unseen: Tensor, background_weight: float
) -> Tensor:
    """Mean cross-entropy of the floor and, over the cells that count, of each attribute: their sum.

    `images` [B, 3, S, S] are normalized, `classes` [B, A, H, W] and `floors` [B] as in lessons. A pair that no
    lesson shows, true in `unseen` [colors, shapes], is unknown and not impossible: where the color is its own,
    its shape is left out of the choice, and the other way round. Else the encoder learns that nothing red is a
    sphere.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grids = pupil.encoder(images)  # [B, C, H, W]
    answers, floor = pupil.answers(grids.float().flatten(2).transpose(1, 2))
    logits = dict(zip(ATTRIBUTES, answers, strict=True))  # [B, P, classes]
    wanted = dict(zip(ATTRIBUTES, classes.long().flatten(2).unbind(dim=1), strict=True))  # [B, P]
    known = {name: indices.clamp(min=BACKGROUND) for name, indices in wanted.items()}
    logits["shape"] = logits["shape"].masked_fill(unseen[known["color"]], -math.inf)
    logits["color"] = logits["color"].masked_fill(unseen.T[known["shape"]], -math.inf)

    loss = F.cross_entropy(floor, floors)
    for name, answer in logits.items():
        weights = torch.ones(answer.shape[-1])
        weights[BACKGROUND] = background_weight
        loss += F.cross_entropy(answer.transpose(1, 2), wanted[name], weights, ignore_index=IGNORE)
    return loss


def write_weights(encoder: GridEncoder, path: Path) -> None:
    """Write the encoder's weights as float16 safetensors, without batch norm's counters."""
    weights = {
        name: tensor.half().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    write_atomically(path, safetensors.torch.save(weights))


def evaluate(pupil: EncoderWithHeads, weights: Path, lessons: Sequence[Example], syllabus: SamplingSpec) -> Figures:
    """Tell how often the pupil's heads answer right on the features of the encoder in the file `weights`.

    These heads were never told that a held-out pair is wrong, and lean towards it: their figures flatter held-out
    pairs and fall short for seen ones.
    """
    encoder = load_encoder(
        EncodeParams(
            architecture=ARCHITECTURE,
            layer=LAYER,
            weights=weights,
            image_size=syllabus.size,
            precision="float32",
            compile=False,
            views=("whole",),
        )
    )
    right: dict[str, list[npt.NDArray[np.bool_]]] = {"seen": [], "seen_small_patterned": [], "held_out": []}
    cells: dict[str, list[bool]] = {"with_a_body": [], "empty": []}
    floors: list[bool] = []
    for start in range(0, len(lessons), _LESSONS_A_TEST_BATCH):
        batch = lessons[start : start + _LESSONS_A_TEST_BATCH]
        told, told_floors = _answers(pupil, encoder, batch)
        for lesson, classes, floor in zip(batch, told, told_floors, strict=True):
            floors.append(FLOORS[floor] == lesson.scene.floor)
            cells["with_a_body"] += list(classes[0][lesson.classes[0] > BACKGROUND] != BACKGROUND)
            cells["empty"] += list(classes[0][lesson.classes[0] == BACKGROUND] == BACKGROUND)
            for body, box in zip(lesson.scene.bodies, lesson.boxes, strict=True):
                answers = classes[(slice(None), *center_cell(box, syllabus.stride))] == classes_of(body)
                if (body.color, body.shape) in syllabus.held_out:
                    right["held_out"].append(answers)
                    continue
                right["seen"].append(answers)
                if body.size == "small" and body.texture in ("striped", "spotted"):
                    right["seen_small_patterned"].append(answers)
    return {
        "protocol": "share of right answers from the one cell that the center of a body's box lies in",
        "bodies": {group: _shares_right(answers) for group, answers in right.items() if answers},
        "cells": {group: _rounded(np.mean(answers)) for group, answers in cells.items()},
        "floor": _rounded(np.mean(floors)),
        "weights": file_digest(weights),
    }


def _drawn(syllabus: SamplingSpec, purpose: Purpose, count: int, workers: int) -> list[Example]:
    lessons = draw_lessons(syllabus, purpose, count, workers)
    return list(tqdm(lessons, total=count, desc=f"{STAGE}, {purpose} scenes", unit="scene"))


def _run_epoch(
    params: SceneEncoderParams, pupil: EncoderWithHeads, optimizer: torch.optim.Optimizer, lessons: Lessons, epoch: int
) -> None:
    rng = np.random.default_rng([params.seed, epoch])
    order = torch.from_numpy(rng.permutation(len(lessons.floors)))
    batches = torch.split(order, params.batch_size)
    total = 0.0
    with tqdm(batches, desc=f"{STAGE}, epoch {epoch + 1} of {params.max_epochs}", unit="batch") as bar:
        for step, chosen in enumerate(bar):
            rate = _learning_rate(params, epoch * len(batches) + step, params.max_epochs * len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            images, classes = _varied(lessons, chosen, params.brightness_jitter, rng)
            loss = caption_loss(
                pupil, images, classes, lessons.floors[chosen], lessons.unseen, params.background_weight
            )
            total += loss.item()
            if not math.isfinite(total):
                raise UserError(f"the loss is not finite in epoch {epoch + 1}, step {step + 1}; lower encoder.peak_lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.set_postfix_str(f"loss {total / (step + 1):.3f}", refresh=False)


def _learning_rate(params: SceneEncoderParams, step: int, steps: int) -> float:
    warm_up = params.warmup_fraction * steps
    if step < warm_up:
        return params.peak_lr * (step + 1) / (warm_up + 1)
    return params.peak_lr * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))) / 2


def _varied(
    lessons: Lessons, chosen: Tensor, brightness_jitter: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Lessons, normalized [B, 3, S, S], and their classes [B, A, H, W], some mirrored, all lit a little otherwise."""
    mirrored = torch.from_numpy(rng.random(len(chosen)) < 0.5)[:, None, None, None]
    light = torch.from_numpy(rng.uniform(1 - brightness_jitter, 1 + brightness_jitter, len(chosen)).astype(np.float32))
    pictures, classes = lessons.pictures[chosen], lessons.classes[chosen]
    pictures = torch.where(mirrored, pictures.flip(2), pictures)
    lit = (pictures * light[:, None, None, None]).clamp(max=255)
    return normalize(lit), torch.where(mirrored, classes.flip(3), classes)


@torch.inference_mode()
def _answers(
    pupil: EncoderWithHeads, encoder: GridEncoder, lessons: Sequence[Example]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Classes told, [B, A, H, W], and floors told, [B]."""
    pictures = np.stack([lesson.picture for lesson in lessons])
    answers, floors = pupil.answers(torch.from_numpy(encode_grids(encoder, pictures)).float())
    classes = torch.stack([logits.argmax(dim=-1) for logits in answers], dim=1)  # [B, A, P]
    return classes.view(len(lessons), *lessons[0].classes.shape).numpy(), floors.argmax(dim=-1).numpy()


def _shares_right(answers: list[npt.NDArray[np.bool_]]) -> Figures:
    table = np.stack(answers)  # [bodies, A]
    shares = {name: _rounded(share) for name, share in zip(ATTRIBUTES, table.mean(axis=0), strict=True)}
    both = table[:, [list(ATTRIBUTES).index("shape"), list(ATTRIBUTES).index("color")]].all(axis=1)
    return {"count": len(table), **shares, "shape_and_color": _rounded(both.mean())}


def _rounded(share: float | np.floating[Any]) -> float:
    return round(float(share), 4)
