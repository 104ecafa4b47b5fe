"""The captioners of the app. Each is loaded once for all sessions, and again when its model folder changes."""

import os
from pathlib import Path

import streamlit as st
from PIL import Image

from pipeline.app.work_queue import work_queue
from pipeline.decoder.model_io import CONFIG_FILE
from pipeline.generation.search_settings import search_settings_paths
from pipeline.prediction.captioner import Captioner

MAX_LOADED = 4
"""Maximum captioners in memory; loading another drops the one loaded first."""


def load_captioner(folder: Path) -> Captioner:
    """Load the captioner of a model folder, or return the cached one if model and search settings are unchanged.

    Raises:
        UserError: As `Captioner.load` does.
    """
    files = (folder / CONFIG_FILE, *search_settings_paths(folder))
    return _load_cached(folder, tuple(path.stat().st_mtime_ns if path.is_file() else None for path in files))


@st.cache_resource(max_entries=MAX_LOADED, show_spinner=False)
def _load_cached(folder: Path, modified_ns: tuple[int | None, ...]) -> Captioner:
    captioner = Captioner.load(folder, device=os.environ.get("GRIDCAP_DEVICE", "auto"))
    # The first image of a thread is slow, since PyTorch initializes per thread: warm up the worker thread.
    work_queue().submit(lambda: captioner.caption([Image.new("RGB", (64, 64))])).result()
    return captioner
