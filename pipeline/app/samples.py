"""Pictures to try: of the dataset's test split where the app runs in a repository that has one, else fresh scenes."""

from pathlib import Path

import numpy as np
import streamlit as st

from pipeline.app.uploads import Picture, as_jpeg
from pipeline.captions.records import read_records
from pipeline.errors import UserError
from pipeline.features.images import read_image, read_image_file
from pipeline.params import read_yaml
from pipeline.scenes.renderer import render
from pipeline.scenes.scene import sample_scene

COUNT = 8
THUMBNAIL = 112
"""Side of the square that the page shows of a sample, in px."""
SCENE = 256
"""Side of a rendered scene, in px."""


@st.cache_resource(show_spinner=False)
def samples() -> list[Picture]:
    """Give the samples, the same to all sessions."""
    try:
        found = _of_the_dataset(Path("params.yaml"), Path("data/prepared"))
    except (UserError, KeyError, TypeError):  # no repository of gridcap, or one in which nothing has run
        found = []
    return found or [_scene(seed) for seed in range(COUNT)]


@st.cache_resource(show_spinner=False)
def thumbnails() -> list[bytes]:
    """Give the samples as small square JPEGs."""
    return [as_jpeg(read_image(sample.content, THUMBNAIL)) for sample in samples()]


def _of_the_dataset(params: Path, prepared: Path) -> list[Picture]:
    # The section's own class would bring along what reads datasets, which the app does without.
    dataset = read_yaml(params)["dataset"]
    test = [record for record in read_records(prepared) if record.split == "test"]
    step = max(1, len(test) // COUNT)
    paths = [Path(dataset["root"], dataset["images"], record.file) for record in test[::step][:COUNT]]
    return [Picture(name=path.name, content=read_image_file(path)) for path in paths]


def _scene(seed: int) -> Picture:
    scene = sample_scene(np.random.default_rng(seed), forbidden=frozenset(), required=None, duplicate_rate=0.2)
    return Picture(name=f"scene {seed + 1}", content=as_jpeg(render(scene, SCENE).image))
