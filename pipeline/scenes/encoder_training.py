"""Training of the scene encoder: a ResNet-18 up to `layer3`, trained to classify the object in every grid cell.

It replaces ImageNet weights, which would have to be downloaded. Training on dense labels makes the features of a region
depend on the object in it, so that attention maps can be evaluated by location.

B examples per batch, N examples in total, S side of the image in px, H and W height and width of the grid, P = H * W
regions, C channels, A attributes.
"""

import io
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pipeline.artifacts import file_digest, fingerprint, work_folder, write_atomically, write_json
from pipeline.errors import UserError
from pipeline.features.encoder import GridEncoder, encode_grids, read_encoder
from pipeline.features.images import normalize
from pipeline.features.resnets import IMAGENET, STRIDES, Architecture, Layer
from pipeline.import_graph import code_digest
from pipeline.params import params_section, to_plain
from pipeline.scenes.dataset import RenderParams
from pipeline.scenes.examples import (
    ATTRIBUTES,
    BACKGROUND,
    IGNORE,
    Example,
    ExampleSplit,
    SamplingSpec,
    center_cell,
    object_labels,
    sample_examples,
)
from pipeline.scenes.scene import COLORS, FLOORS, SHAPES, ColorShape, SceneObject

STAGE = "encoder"
CHECKPOINT_FILE = "checkpoint.pt"
WEIGHTS_FILE = "encoder.safetensors"
METRICS_FILE = "encoder.json"
ARCHITECTURE: Architecture = "resnet18"
LAYER: Layer = "layer3"
STRIDE = STRIDES[LAYER]

_NUM_CLASSES = [1 + len(values) for values in ATTRIBUTES.values()]
"""Classes of each attribute, the background included."""
_EVAL_BATCH_SIZE = 50

Metrics = dict[str, Any]


@params_section
class SceneEncoderParams:
    """Section `encoder`: training of the embedded dataset's encoder."""

    seed: Annotated[int, Field(ge=0)]
    """Seed of examples, initialization, batch order and augmentation."""
    num_train: Annotated[int, Field(ge=1, le=1_000_000)]
    """Number of train scenes; none is in the dataset or contains a held-out pair."""
    num_test: Annotated[int, Field(ge=2, le=1_000_000)]
    """Number of test scenes; every second contains a held-out pair."""
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    """Scenes per optimizer step."""
    max_epochs: Annotated[int, Field(ge=1, le=100_000)]
    """Number of epochs; there is no early stopping."""
    peak_lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW, after the warm-up and before the cosine decay to 0."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of all steps in the linear warm-up; 0 disables it."""
    weight_decay: Annotated[float, Field(ge=0, le=100)]
    """Weight decay coefficient of AdamW; 0 disables it."""
    background_weight: Annotated[float, Field(gt=0, le=1000)]
    """Loss weight of background cells, which outnumber cells with an object; those have weight 1."""
    brightness_jitter: Annotated[float, Field(ge=0, lt=1)]
    """Maximum relative change of brightness in augmentation; 0 disables it."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """All training examples, in memory."""

    images: Tensor
    """uint8 [N, S, S, 3]."""
    labels: Tensor
    """int8 [N, A, H, W]."""
    floors: Tensor
    """int64 [N], indices into `FLOORS`."""
    held_out: Tensor
    """bool [1 + colors, 1 + shapes]: whether the pair of labels is held out."""


class EncoderWithHeads(nn.Module):
    """The encoder with its classification heads, which are discarded after training."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.encoder = GridEncoder(ARCHITECTURE, LAYER)
        # The random initialization of torchvision (He et al. 2015, Delving Deep into Rectifiers).
        initial_weights = torchvision.models.get_model(ARCHITECTURE, weights=None).state_dict()
        self.encoder.load_state_dict(initial_weights, strict=False, assign=True)
        self.attribute_head = nn.Linear(self.encoder.channels, sum(_NUM_CLASSES))
        self.floor_head = nn.Linear(self.encoder.channels, len(FLOORS))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def classify(self, regions: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Apply the heads to region features [B, P, C].

        Returns:
            Logits [B, P, classes] of each attribute, and logits [B, floors] of the floor.
        """
        attribute_logits = torch.split(self.attribute_head(regions), _NUM_CLASSES, dim=-1)
        return attribute_logits, self.floor_head(regions.mean(dim=1))


@contextmanager
def train_scene_encoder(
    params: SceneEncoderParams, render_params: RenderParams, work: Path, num_workers: int
) -> Iterator[tuple[Path, Path]]:
    """Render the examples, train the encoder and evaluate it.

    An interrupted run resumes after its last complete epoch; examples are rendered again. The lock of the work folder
    is held while the caller publishes the files.

    Args:
        params: Section `encoder`.
        render_params: Section `render`, for the image size and the held-out pairs.
        work: Folder of unfinished work, kept between runs.
        num_workers: Number of rendering processes.

    Yields:
        The weights file, which is float16 safetensors with `GridEncoder`'s names, and the JSON file of its metrics
        (see `evaluate`), both in the work folder.

    Raises:
        UserError: The image size is not a multiple of the stride, or the loss is not finite.
    """
    if render_params.image_size % STRIDE:
        raise UserError(
            f"render.image_size: must be a multiple of {STRIDE}, the stride of the encoder, got"
            f" {render_params.image_size}. Change it in the params file."
        )
    spec = SamplingSpec(
        seed=params.seed, image_size=render_params.image_size, stride=STRIDE, held_out=render_params.held_out
    )
    run_fingerprint = fingerprint(
        params=to_plain(params), spec=asdict(spec), code=code_digest(__name__), torch=torch.__version__
    )
    with work_folder(work, STAGE, run_fingerprint) as folder:
        training_set = stack(_sample_all(spec, "train", params.num_train, num_workers), render_params.held_out)
        model = train(params, training_set, folder / CHECKPOINT_FILE)
        weights, metrics = folder / WEIGHTS_FILE, folder / METRICS_FILE
        write_weights(model.encoder, weights)
        examples = _sample_all(spec, "test", params.num_test, num_workers)
        write_json(metrics, evaluate(model, weights, examples, spec))
        yield weights, metrics


def stack(examples: Sequence[Example], held_out: Sequence[ColorShape]) -> TrainingSet:
    """Stack examples into tensors.

    Args:
        examples: Examples without held-out pairs.
        held_out: The held-out pairs.
    """
    held_out_mask = torch.zeros(1 + len(COLORS), 1 + len(SHAPES), dtype=torch.bool)
    for color, shape in held_out:
        held_out_mask[1 + COLORS.index(color), 1 + SHAPES.index(shape)] = True
    return TrainingSet(
        images=torch.from_numpy(np.stack([example.image for example in examples])),
        labels=torch.from_numpy(np.stack([example.labels for example in examples])),
        floors=torch.tensor([FLOORS.index(example.scene.floor) for example in examples]),
        held_out=held_out_mask,
    )


def train(params: SceneEncoderParams, training_set: TrainingSet, checkpoint: Path) -> EncoderWithHeads:
    """Train from scratch, or resume from a checkpoint.

    Args:
        params: Section `encoder`.
        training_set: The training examples.
        checkpoint: Checkpoint file, written after every epoch.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: The checkpoint is damaged, or the loss is not finite.
    """
    torch.manual_seed(params.seed)
    model = EncoderWithHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=params.peak_lr, weight_decay=params.weight_decay)
    start_epoch = 0
    if checkpoint.is_file():
        try:
            state = torch.load(checkpoint, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            start_epoch = operator.index(state["num_epochs"])
        except Exception as error:  # torch.load raises errors of every kind for damaged files.
            raise UserError(f"{checkpoint}: not a valid checkpoint. Delete it to train from the start.") from error
    model.train()
    for epoch in range(start_epoch, params.max_epochs):
        _train_epoch(params, model, optimizer, training_set, epoch)
        buffer = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "num_epochs": epoch + 1}
        torch.save(state, buffer)
        write_atomically(checkpoint, buffer.getvalue())
    return model.eval()


def classification_loss(
    model: EncoderWithHeads,
    images: Tensor,
    labels: Tensor,
    floors: Tensor,
    held_out: Tensor,
    background_weight: float,
) -> Tensor:
    """Return the sum of the mean cross-entropies of the floor and of every attribute.

    A held-out pair is unknown, not impossible: where a cell has the pair's color, the pair's shape is removed from the
    softmax over shapes, and vice versa. Otherwise the encoder would learn that nothing red is a sphere.

    Args:
        model: Encoder and heads.
        images: Normalized images [B, 3, S, S].
        labels: Labels [B, A, H, W] of the cells.
        floors: Labels [B] of the floors.
        held_out: Held-out pairs, bool [1 + colors, 1 + shapes].
        background_weight: Weight of background cells in the mean; cells with an object have weight 1.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grids = model.encoder(images)  # [B, C, H, W]
    attribute_logits, floor_logits = model.classify(grids.float().flatten(2).transpose(1, 2))
    logits = dict(zip(ATTRIBUTES, attribute_logits, strict=True))  # [B, P, classes]
    targets = dict(zip(ATTRIBUTES, labels.long().flatten(2).unbind(dim=1), strict=True))  # [B, P]
    label_indices = {
        name: target.clamp(min=BACKGROUND) for name, target in targets.items()
    }  # IGNORE is not a valid index
    logits["shape"] = logits["shape"].masked_fill(held_out[label_indices["color"]], -math.inf)
    logits["color"] = logits["color"].masked_fill(held_out.T[label_indices["shape"]], -math.inf)

    loss = F.cross_entropy(floor_logits, floors)
    for name, attribute in logits.items():
        class_weights = torch.ones(attribute.shape[-1])
        class_weights[BACKGROUND] = background_weight
        loss += F.cross_entropy(attribute.transpose(1, 2), targets[name], class_weights, ignore_index=IGNORE)
    return loss


def write_weights(encoder: GridEncoder, path: Path) -> None:
    """Write the encoder's weights as float16 safetensors, without the counters of batch norm."""
    weights = {
        name: tensor.half().contiguous()
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    write_atomically(path, safetensors.torch.save(weights))


def evaluate(model: EncoderWithHeads, weights: Path, examples: Sequence[Example], spec: SamplingSpec) -> Metrics:
    """Measure the accuracy of the heads on features of the encoder in a weights file.

    The heads were never penalized for predicting a held-out pair and are biased towards it. This raises the accuracy
    for held-out pairs and lowers it for seen ones.

    Args:
        model: Encoder and heads; only its heads are used.
        weights: Weights file of the encoder.
        examples: Test examples.
        spec: Parameters of the examples.

    Returns:
        Accuracy per attribute for the objects with a seen pair, the small striped or spotted ones among them, and the
        objects with a held-out pair; accuracy of object against background per cell; accuracy of the floor; SHA-256 of
        the weights.
    """
    encoder = read_encoder(weights, ARCHITECTURE, LAYER)
    # Per object, whether each attribute is correct: [A].
    correct: dict[str, list[npt.NDArray[np.bool_]]] = {"seen": [], "seen_small_patterned": [], "held_out": []}
    cells_correct: dict[str, list[bool]] = {"object": [], "background": []}
    floors_correct: list[bool] = []
    for start in range(0, len(examples), _EVAL_BATCH_SIZE):
        batch = examples[start : start + _EVAL_BATCH_SIZE]
        for example, labels, floor in zip(batch, *_predict(model, encoder, batch), strict=True):
            floors_correct.append(FLOORS[floor] == example.scene.floor)
            # BACKGROUND is the same for all attributes; the first represents them.
            cells_correct["object"] += list(labels[0][example.labels[0] > BACKGROUND] != BACKGROUND)
            cells_correct["background"] += list(labels[0][example.labels[0] == BACKGROUND] == BACKGROUND)
            for obj, box in zip(example.scene.objects, example.boxes, strict=True):
                is_correct = labels[(slice(None), *center_cell(box, spec.stride))] == object_labels(obj)
                for group in _groups(obj, spec.held_out):
                    correct[group].append(is_correct)
    return {
        "protocol": "accuracy in the cell that contains the center of the object's bounding box",
        "objects": {group: _accuracies(values) for group, values in correct.items() if values},
        "cells": {group: _round(np.mean(values)) for group, values in cells_correct.items()},
        "floor": _round(np.mean(floors_correct)),
        "weights_sha256": file_digest(weights),
    }


def _sample_all(spec: SamplingSpec, split: ExampleSplit, num_examples: int, num_workers: int) -> list[Example]:
    examples = sample_examples(spec, split, num_examples, num_workers)
    return list(tqdm(examples, total=num_examples, desc=f"{STAGE}, {split} scenes", unit="scene"))


def _train_epoch(
    params: SceneEncoderParams,
    model: EncoderWithHeads,
    optimizer: torch.optim.Optimizer,
    training_set: TrainingSet,
    epoch: int,
) -> None:
    rng = np.random.default_rng([params.seed, epoch])
    order = torch.from_numpy(rng.permutation(len(training_set.floors)))
    batches = torch.split(order, params.batch_size)
    total_loss = 0.0
    with tqdm(batches, desc=f"{STAGE}, epoch {epoch + 1} of {params.max_epochs}", unit="batch") as progress:
        for step, indices in enumerate(progress):
            lr = _learning_rate(params, epoch * len(batches) + step, params.max_epochs * len(batches))
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, labels = _augment(training_set, indices, params.brightness_jitter, rng)
            floors = training_set.floors[indices]
            loss = classification_loss(model, images, labels, floors, training_set.held_out, params.background_weight)
            total_loss += loss.item()
            if not math.isfinite(total_loss):
                raise UserError(f"epoch {epoch + 1}, step {step + 1}: the loss is not finite. Lower encoder.peak_lr.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.set_postfix_str(f"loss {total_loss / (step + 1):.3f}", refresh=False)


def _learning_rate(params: SceneEncoderParams, step: int, num_steps: int) -> float:
    warmup_steps = params.warmup_fraction * num_steps
    if step < warmup_steps:
        return params.peak_lr * (step + 1) / (warmup_steps + 1)
    return params.peak_lr * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps))) / 2


def _augment(
    training_set: TrainingSet, indices: Tensor, brightness_jitter: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Flip examples at random and jitter their brightness.

    Returns:
        Normalized images [B, 3, S, S] and labels [B, A, H, W].
    """
    is_flipped = torch.from_numpy(rng.random(len(indices)) < 0.5)[:, None, None, None]
    brightness = rng.uniform(1 - brightness_jitter, 1 + brightness_jitter, len(indices)).astype(np.float32)
    images, labels = training_set.images[indices], training_set.labels[indices]
    images = torch.where(is_flipped, images.flip(2), images)  # [B, S, S, 3]
    brightened = (images * torch.from_numpy(brightness)[:, None, None, None]).clamp(max=255)
    return normalize(brightened, IMAGENET), torch.where(is_flipped, labels.flip(3), labels)


@torch.inference_mode()
def _predict(
    model: EncoderWithHeads, encoder: GridEncoder, examples: Sequence[Example]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return predicted labels [B, A, H, W] of the cells and predicted indices [B] of the floors."""
    images = np.stack([example.image for example in examples])
    attribute_logits, floor_logits = model.classify(torch.from_numpy(encode_grids(encoder, images)).float())
    labels = torch.stack([logits.argmax(dim=-1) for logits in attribute_logits], dim=1)  # [B, A, P]
    return labels.view(len(examples), *examples[0].labels.shape).numpy(), floor_logits.argmax(dim=-1).numpy()


def _groups(obj: SceneObject, held_out: Sequence[ColorShape]) -> list[str]:
    """Return the groups of objects, in the metrics, that an object belongs to."""
    if (obj.color, obj.shape) in held_out:
        return ["held_out"]
    is_small_patterned = obj.size == "small" and obj.texture in ("striped", "spotted")
    return ["seen", "seen_small_patterned"] if is_small_patterned else ["seen"]


def _accuracies(correct: list[npt.NDArray[np.bool_]]) -> Metrics:
    """Return the accuracy per attribute, and that of shape and color together."""
    table = np.stack(correct)  # [objects, A]
    accuracies = {name: _round(accuracy) for name, accuracy in zip(ATTRIBUTES, table.mean(axis=0), strict=True)}
    both_correct = table[:, [list(ATTRIBUTES).index("shape"), list(ATTRIBUTES).index("color")]].all(axis=1)
    return {"num_objects": len(table), **accuracies, "shape_and_color": _round(both_correct.mean())}


def _round(fraction: float | np.floating[Any]) -> float:
    return round(float(fraction), 4)
