"""Small evaluation data for the tests of evaluation and report."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.captions.records import Record
from pipeline.evaluation.evaluate import EvaluateInputs, EvaluationData
from pipeline.generation.caption import Caption
from pipeline.generation.caption_io import GeneratedCaptions
from tests.factories import small_spec
from tests.feature_stores import write_store

GRID = (4, 6)


def peaked_attention(*peaks: tuple[int, int]) -> np.ndarray:
    """Return attention [T, 4, 6] with weight 0.54 on one region of each word and 0.02 on all others."""
    attention = np.full((len(peaks), *GRID), 0.02)
    for index, (row, column) in enumerate(peaks):
        attention[index, row, column] = 0.54
    return attention


def make_caption(words: tuple[str, ...], attention: np.ndarray) -> Caption:
    """Return a caption whose words all have log-probability -1."""
    return Caption(
        words=words,
        log_probability=-float(len(words)),
        score=-1.0,
        word_log_probabilities=(-1.0,) * len(words),
        attention=attention,
    )


def make_data(
    folder: Path, image_dir: Path, records: list[Record], caption: str, view: str = "whole"
) -> EvaluationData:
    """Make evaluation data in which all images have the same caption, without tokens and model.

    Args:
        folder: Folder for the feature store.
        image_dir: Folder of the images.
        records: Records of the split.
        caption: Generated caption of every image.
        view: View in the feature store.
    """
    words = tuple(caption.split())
    best = make_caption(words, peaked_attention(*((index, index) for index in range(len(words)))))
    spec = small_spec(grid_height=GRID[0], grid_width=GRID[1])
    grids = np.zeros((len(records), GRID[0] * GRID[1], spec.channels), dtype=np.float16)
    store = write_store(folder / "features", spec, [record.image_id for record in records], grids, (view,))
    values: dict[str, Any] = {
        "split": "test",
        "records": records,
        "num_skipped_images": 0,
        "generated": {
            record.image_id: GeneratedCaptions(image_id=record.image_id, captions=(best,)) for record in records
        },
        "trained_captions": None,
        "tokens": None,
        "train_captions": None,
        "store": store,
        "model": None,
        "history": [{"epoch": 1, "val_loss": 3.0, "val_cider": None}, {"epoch": 2, "val_loss": 2.5, "val_cider": 0.5}],
        "refine_history": [],
        "inputs": EvaluateInputs(
            prepared=folder, image_dir=image_dir, tokens=folder, features=folder, model=folder, generated=folder
        ),
    }
    return EvaluationData(**values)
