import weakref
from threading import Event

import pytest

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.work_queue import WorkQueue
from pipeline.errors import UserError


def test_full_queue_rejects_jobs_until_one_is_done() -> None:
    queue, event = WorkQueue(max_jobs=2), Event()
    futures = [queue.submit(event.wait), queue.submit(lambda: 7)]
    with pytest.raises(UserError, match="too many images"):
        queue.submit(lambda: 8)
    event.set()
    assert [future.result() for future in futures] == [True, 7]
    assert queue.submit(lambda: 9).result() == 9


def test_jobs_run_in_order() -> None:
    queue, order = WorkQueue(max_jobs=5), []
    for future in [queue.submit(lambda index=index: order.append(index)) for index in range(5)]:
        future.result()
    assert order == [0, 1, 2, 3, 4]


def test_cancelled_and_failed_jobs_leave_the_queue() -> None:
    queue, event = WorkQueue(max_jobs=2), Event()
    running, waiting = queue.submit(event.wait), queue.submit(event.wait)
    assert waiting.cancel()
    failed = queue.submit(lambda: 1 / 0)
    event.set()
    running.result()
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert [queue.submit(lambda: 3).result() for _ in range(4)] == [3] * 4


def test_canceled_job_is_freed_while_it_waits() -> None:
    queue, event, image = WorkQueue(max_jobs=2), Event(), Event()
    running, waiting = queue.submit(event.wait), queue.submit(image.is_set)
    image_ref = weakref.ref(image)
    del image
    assert image_ref() is not None
    assert waiting.cancel()
    assert image_ref() is None
    event.set()
    assert running.result()
