"""The queue of captioning jobs: one worker thread for all sessions.

Concurrent jobs would only compete for the same cores. Each session waits in its own thread, so a waiting session does
not block the pages of others.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import streamlit as st

from pipeline.errors import UserError

T = TypeVar("T")

MAX_JOBS = 96
"""Maximum waiting and running jobs of all sessions together: three for each of 32 visitors who compare two models."""


class WorkQueue:
    """One thread that runs jobs in the order in which they were submitted."""

    def __init__(self, max_jobs: int) -> None:
        """Make an empty queue.

        Args:
            max_jobs: Maximum waiting and running jobs.
        """
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="captions")
        self._slots = threading.BoundedSemaphore(max_jobs)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job.

        Raises:
            UserError: The queue is full.
        """
        if not self._slots.acquire(blocking=False):
            raise UserError("too many images in the queue. Try again in a moment.")
        pending = [job]  # emptied when the job starts or is canceled, to free its image
        future = self._executor.submit(lambda: pending.pop()())
        future.add_done_callback(lambda _: pending.clear())
        future.add_done_callback(lambda _: self._slots.release())
        return future


@st.cache_resource(show_spinner=False)
def work_queue() -> WorkQueue:
    """Return the queue that all sessions of this server share."""
    return WorkQueue(MAX_JOBS)
