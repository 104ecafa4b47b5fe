import gc

import pytest

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from streamlit.runtime.uploaded_file_manager import UploadedFileRec

from pipeline.app.upload_store import MAX_SESSION_MEGABYTES, MAX_TOTAL_MEGABYTES, UploadStore
from pipeline.app.uploads import MAX_BYTES, ImageFile
from pipeline.errors import UserError

MB = 2**20


def expect_upload(store: UploadStore, session_id: str) -> str:
    """Ask for an upload, as the page does, and return its file id."""
    [url] = store.get_upload_urls(session_id, ["a.jpg"])
    return url.file_id


def add(store: UploadStore, session_id: str, file_id: str, num_bytes: int) -> None:
    store.add_file(session_id, UploadedFileRec(file_id, "a.jpg", "image/jpeg", bytes(num_bytes)))


def held_bytes(store: UploadStore) -> int:
    return sum(stat.byte_length for stats in store.get_stats().values() for stat in stats)


def test_only_the_latest_expected_upload_is_accepted_once() -> None:
    store = UploadStore("/upload")
    old, new = expect_upload(store, "s"), expect_upload(store, "s")
    for session_id, file_id in (("s", "unrequested"), ("s", old), ("other", new)):
        refusal = store.reserve(session_id, file_id, 1)
        assert refusal is not None
        assert refusal.status == 403
        add(store, session_id, file_id, MB)
    assert held_bytes(store) == 0
    assert store.reserve("s", new, MB) is None
    add(store, "s", new, MB)
    assert held_bytes(store) == MB
    refusal = store.reserve("s", new, MB)
    assert refusal is not None
    assert refusal.status == 403


def test_many_file_names_expect_one_upload() -> None:
    assert len(UploadStore("/upload").get_upload_urls("s", ["a.jpg"] * 1000)) == 1


def test_uploads_that_are_never_read_do_not_accumulate() -> None:
    store = UploadStore("/upload")
    for _ in range(30):
        add(store, "s", expect_upload(store, "s"), MB)
        assert held_bytes(store) == MB


def test_uploads_that_arrive_count_until_they_are_released() -> None:
    store = UploadStore("/upload")
    file_id = expect_upload(store, "s")
    num_accepted = MAX_SESSION_MEGABYTES * MB // MAX_BYTES
    for _ in range(num_accepted):
        assert store.reserve("s", file_id, MAX_BYTES) is None
    refusal = store.reserve("s", file_id, MAX_BYTES)
    assert refusal is not None
    assert refusal.status == 413
    assert f"{MAX_SESSION_MEGABYTES} MB" in refusal.reason
    store.release("s", MAX_BYTES)
    assert store.reserve("s", file_id, MAX_BYTES) is None


def test_sessions_share_a_limit_and_images_count_while_they_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.app.upload_store.MAX_TOTAL_MEGABYTES", 5)
    store = UploadStore("/upload")
    images = [ImageFile(name=f"{index}.jpg", content=bytes(MB)) for index in range(5)]
    for index, image in enumerate(images):
        store.register_image(f"session {index}", image)
        store.register_image(f"session {index}", image)  # on every draw of the page
    extra = ImageFile(name="extra.jpg", content=bytes(MB))
    with pytest.raises(UserError, match=r"^extra\.jpg: the app holds too many images \(limit 5 MB\)\. Try again"):
        store.register_image("new", extra)
    refusal = store.reserve("new", expect_upload(store, "new"), MB)
    assert refusal is not None
    assert refusal.status == 503
    store.register_image("session 0", ImageFile(name="new.jpg", content=bytes(MB)))  # replaces the previous image
    del images, image
    gc.collect()
    store.register_image("new", extra)


def test_upload_that_ends_after_its_session_is_dropped() -> None:
    store = UploadStore("/upload")
    read, late = expect_upload(store, "a"), expect_upload(store, "b")
    add(store, "a", read, MB)
    for session_id in ("a", "b"):
        store.remove_session_files(session_id)
    add(store, "b", late, MB)
    assert held_bytes(store) == 0
    assert store.file_storage == {}


def test_twenty_sessions_can_upload_the_largest_image_at_once() -> None:
    assert MAX_TOTAL_MEGABYTES * MB >= 20 * (MAX_BYTES + MB)  # a request is slightly larger than its file
