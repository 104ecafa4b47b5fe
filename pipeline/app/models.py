"""The captioners of the app: each loaded once for all sessions, all working in one thread.

One thread, since two captions at once would only take each other's cores. Sessions wait for it in turn, each in a
thread of its own, so that none keeps another's page from being drawn.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import streamlit as st
from PIL import Image

from pipeline.decoder.model_io import CONFIG_FILE
from pipeline.errors import UserError
from pipeline.prediction.captioner import Captioner

T = TypeVar("T")

MOST_WAITING = 16
"""Pictures that may wait for their captions, of all sessions together."""
MOST_LOADED = 4
"""Captioners kept in memory; the one loaded first makes way."""


def captioner(folder: Path) -> Captioner:
    """Give the captioner of a model folder, loaded again only where the folder was written anew.

    Raises `UserError` as `Captioner.load` does.
    """
    config = folder / CONFIG_FILE
    return _load(folder, config.stat().st_mtime_ns if config.is_file() else None)


@st.cache_resource(max_entries=MOST_LOADED, show_spinner=False)
def _load(folder: Path, written: int | None) -> Captioner:
    loaded = Captioner.load(folder, device=os.environ.get("GRIDCAP_DEVICE", "auto"))
    # PyTorch makes ready at the first picture, in the thread that works.
    queue().ask(lambda: loaded.caption([Image.new("RGB", (64, 64))])).result()
    return loaded


class Queue:
    """One thread that does what sessions ask of it, in the order asked."""

    def __init__(self, most: int) -> None:
        """Have at most so many wait."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="captions")
        self._places = threading.BoundedSemaphore(most)

    def ask(self, work: Callable[[], T]) -> Future[T]:
        """Have `work` done in its turn. Raises `UserError` where as many wait as may."""
        if not self._places.acquire(blocking=False):
            raise UserError("too many pictures are waiting for their captions; try again in a moment")
        answer = self._thread.submit(work)
        answer.add_done_callback(lambda _: self._places.release())
        return answer


@st.cache_resource(show_spinner=False)
def queue() -> Queue:
    """Give the queue of this server."""
    return Queue(MOST_WAITING)
