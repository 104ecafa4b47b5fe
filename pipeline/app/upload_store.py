"""Limits on the memory of images: uploads that arrive, wait to be read, or are shown by a page.

Streamlit accepts any number of uploads to an open session and keeps them until the session ends. `UploadStore` replaces
its store of uploads; `UploadLimits` answers uploads over the limits before their bytes are read.
"""

import re
from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple
from weakref import WeakValueDictionary

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit.runtime import get_instance, memory_uploaded_file_manager
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.uploaded_file_manager import UploadedFileRec, UploadFileUrlInfo

from pipeline.app.uploads import MAX_BYTES, MAX_MEGABYTES, ImageFile
from pipeline.errors import UserError

MAX_SESSION_MEGABYTES = 3 * MAX_MEGABYTES
"""Maximum memory of the images of one session: the one shown, one that arrives and one that waits to be read."""
MAX_TOTAL_MEGABYTES = 600
"""Maximum memory of the images of all sessions together."""


class Refusal(NamedTuple):
    """Answer to an upload that is not accepted."""

    status: int
    """HTTP status."""
    reason: str
    """A sentence for the user."""


class UploadStore(MemoryUploadedFileManager):
    """Streamlit's store of uploads, which accepts only what a page has requested and what the limits allow.

    The page removes an upload once it has read it, and registers the image that it shows.
    """

    def __init__(self, upload_endpoint: str) -> None:
        """Make an empty store.

        Args:
            upload_endpoint: URL path of uploads.
        """
        super().__init__(upload_endpoint)
        self._expected: dict[str, str] = {}
        """File id of the upload that each session expects."""
        self._arriving: Counter[str] = Counter()
        """Bytes of the uploads of each session that are being received."""
        self._images: WeakValueDictionary[str, ImageFile] = WeakValueDictionary()
        """The uploaded image of each session, while anything refers to it."""
        self._reservations = Lock()

    def get_upload_urls(self, session_id: str, file_names: Sequence[str]) -> list[UploadFileUrlInfo]:
        """Expect one upload of a session, in place of uploads that it expected or has not read yet."""
        for file_id in list(self.file_storage.get(session_id, ())):
            self.remove_file(session_id, file_id)
        urls = super().get_upload_urls(session_id, file_names[:1])  # the page uploads single files
        self._expected.update((session_id, url.file_id) for url in urls)
        return urls

    def add_file(self, session_id: str, file: UploadedFileRec) -> None:
        """Add the expected upload, unless the session has ended or expects another one by now."""
        if self._expected.get(session_id) == file.file_id:
            del self._expected[session_id]
            super().add_file(session_id, file)

    def remove_session_files(self, session_id: str) -> None:
        """Remove the uploads of a session that has ended."""
        self._expected.pop(session_id, None)
        super().remove_session_files(session_id)

    def reserve(self, session_id: str, file_id: str, num_bytes: int) -> Refusal | None:
        """Reserve memory for an upload, until `release` is called.

        Returns:
            None if the upload is accepted.
        """
        if self._expected.get(session_id) != file_id:
            return Refusal(403, "no page requested this upload. Reload the page.")
        with self._reservations:
            refusal = self._check_limits(session_id, num_bytes)
            if refusal is None:
                self._arriving[session_id] += num_bytes
        return refusal

    def release(self, session_id: str, num_bytes: int) -> None:
        """Release the memory reserved for an upload, whether it was received or not."""
        with self._reservations:
            self._arriving -= Counter({session_id: num_bytes})

    def register_image(self, session_id: str, image: ImageFile) -> None:
        """Count the image that a session shows, in place of its previous image.

        Raises:
            UserError: The image would exceed a limit.
        """
        with self._reservations:
            self._images.pop(session_id, None)
            refusal = self._check_limits(session_id, len(image.content))
            if refusal is not None:
                raise UserError(f"{image.name}: {refusal.reason}")
            self._images[session_id] = image

    def _check_limits(self, session_id: str, num_bytes: int) -> Refusal | None:
        """Return the answer to an image that would exceed a limit."""
        sizes = Counter(self._arriving)
        sizes.update({session: len(image.content) for session, image in self._images.items()})
        for session, files in list(self.file_storage.items()):
            sizes[session] += sum(len(file.data) for file in list(files.values()))
        if sizes[session_id] + num_bytes > MAX_SESSION_MEGABYTES * 2**20:
            return Refusal(413, f"this page holds too many images (limit {MAX_SESSION_MEGABYTES} MB). Reload the page.")
        if sizes.total() + num_bytes > MAX_TOTAL_MEGABYTES * 2**20:
            return Refusal(
                503, f"the app holds too many images (limit {MAX_TOTAL_MEGABYTES} MB). Try again in a few minutes."
            )
        return None


class UploadLimits:
    """ASGI middleware that reserves memory in the `UploadStore` for each upload before its bytes are read."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an ASGI application."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; uploads that are not accepted get a sentence."""
        path = re.fullmatch(r"/_stcore/upload_file/([^/]+)/([^/]+)", scope.get("path", ""))
        if path is None or scope.get("method") != "PUT":
            await self._app(scope, receive, send)
            return
        session_id, file_id = path.groups()
        length = Headers(scope=scope).get("content-length", "")
        num_bytes = int(length) if length.isdecimal() else MAX_BYTES  # Streamlit stops reading at about `MAX_BYTES`
        store = upload_store()
        refusal = store.reserve(session_id, file_id, num_bytes)
        if refusal is not None:
            await PlainTextResponse(refusal.reason, refusal.status)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            store.release(session_id, num_bytes)


def install_upload_store() -> None:
    """Make Streamlit's next server use an `UploadStore`, for which it has no setting."""
    memory_uploaded_file_manager.MemoryUploadedFileManager = UploadStore  # type: ignore[misc]


def upload_store() -> UploadStore:
    """Return the store of the running server."""
    store = get_instance().uploaded_file_mgr
    assert isinstance(store, UploadStore), "Streamlit creates its store of uploads elsewhere"
    return store
