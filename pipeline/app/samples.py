"""Sample images: images of the test split of the dataset, or rendered scenes where there is no dataset."""

from pathlib import Path

import numpy as np
import streamlit as st

from pipeline.app.uploads import ImageFile, encode_jpeg
from pipeline.captions.records import read_records
from pipeline.errors import UserError
from pipeline.features.images import read_image, read_image_file
from pipeline.params import load_key
from pipeline.scenes.renderer import render
from pipeline.scenes.scene import sample_scene

NUM_SAMPLES = 8
THUMBNAIL_SIZE = 112
"""Side of the square thumbnail of a sample, px."""
SCENE_SIZE = 256
"""Side of a rendered scene, px."""


@st.cache_resource(show_spinner=False)
def sample_images() -> list[ImageFile]:
    """Return the sample images, which all sessions share."""
    try:
        samples = dataset_samples(Path("params.yaml"), Path("data/prepared"))
    except UserError:  # outside a repository, or before `prepare` has run
        samples = []
    return samples or [_render_scene(seed) for seed in range(NUM_SAMPLES)]


@st.cache_resource(show_spinner=False)
def thumbnails() -> list[bytes]:
    """Return the thumbnails of the samples, as JPEG."""
    return [encode_jpeg(read_image(sample.content, THUMBNAIL_SIZE)) for sample in sample_images()]


def dataset_samples(params: Path, prepared: Path) -> list[ImageFile]:
    """Read up to `NUM_SAMPLES` evenly spaced images of the test split.

    Args:
        params: The params file, with the image folder.
        prepared: Output folder of `prepare`.

    Raises:
        UserError: The params file, the records or an image is missing or invalid.
    """
    # Single keys, since the dataclass of the section would import the dataset readers and their dependencies.
    image_dir = load_key(params, "dataset.root", Path) / load_key(params, "dataset.images", str)
    records = read_records(prepared, "test")
    step = max(1, len(records) // NUM_SAMPLES)
    paths = [image_dir / record.file for record in records[::step][:NUM_SAMPLES]]
    return [ImageFile(name=path.name, content=read_image_file(path)) for path in paths]


def _render_scene(seed: int) -> ImageFile:
    scene = sample_scene(np.random.default_rng(seed), forbidden=frozenset(), required=None, duplicate_rate=0.2)
    return ImageFile(name=f"scene {seed + 1}", content=encode_jpeg(render(scene, SCENE_SIZE).image))
