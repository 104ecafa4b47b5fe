"""Stage `evaluate`, step `draw`: training curves and attention plots."""

import random
from pathlib import Path

from tqdm import tqdm

from pipeline.artifacts import write_json
from pipeline.evaluation.evaluate import EvaluateParams, EvaluationData
from pipeline.features.images import read_visible
from pipeline.report.figures import attention_strip, draw_curves

IMAGE_SIZE = 224
"""Longer side of the images in attention plots, px."""


def draw(data: EvaluationData, params: EvaluateParams, folder: Path) -> None:
    """Draw the training curves and the attention of random images.

    Writes `training.json` (metrics of each epoch), `<metric>.png` (curves) and `attention/<image id>.png`.

    Args:
        data: Artifacts of the split.
        params: Settings of the evaluation.
        folder: Output folder.

    Raises:
        UserError: An image is unreadable.
    """
    write_json(folder / "training.json", data.history)
    draw_curves(data.history, folder, ".png")
    sample = random.Random(params.seed).sample(data.records, min(params.attention_plots, len(data.records)))
    (folder / "attention").mkdir(parents=True, exist_ok=True)
    for record in tqdm(sample, desc="evaluate: attention", unit="image"):
        caption = data.generated[record.image_id]
        path = data.inputs.image_dir / record.file
        image = read_visible(path, IMAGE_SIZE, data.store.spec.frame, data.store.views[0])
        attention_strip(image, caption.words, caption.attention, folder / "attention" / f"{record.image_id}.png")
