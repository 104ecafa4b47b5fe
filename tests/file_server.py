"""An HTTP server on loopback that serves files, with the faults of real servers."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Serves `files` and records `requests`. Attributes that are changed take effect at the next request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        """Content by path, without the leading slash."""
        self.requests: list[tuple[str, str | None]] = []
        """Path and header Range of every request."""
        self.ranges = True
        """Whether ranges are supported."""
        self.cuts: list[int] = []
        """Bytes after which the next responses are cut, first to last; then responses are whole."""
        self.delay = 0.0
        """Seconds between two bytes; 0 sends all at once."""
        self.statuses: list[int] = []
        """Statuses of the next responses, first to last; then responses are files."""
        self.lengths = True
        """Whether responses have a Content-Length."""
        self.claimed_length: int | None = None
        """Content-Length of files, if it is not that of their content."""
        self.login_page = False
        """Whether every file redirects to an HTML page."""

    @property
    def address(self) -> str:
        """Address of the server, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, byte_range = self.path.lstrip("/"), self.headers.get("Range")
        self.server.requests.append((path, byte_range))
        if self.server.statuses:
            self._respond(self.server.statuses.pop(0), {"Content-Length": "0"})
        elif path == "login":
            self._respond(200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>Please log in</html>")
        elif self.server.login_page:
            self._respond(302, {"Location": "/login", "Content-Length": "0"})
        elif path not in self.server.files:
            self._respond(404, {"Content-Length": "0"})
        else:
            self._send_file(self.server.files[path], byte_range)

    def _send_file(self, content: bytes, byte_range: str | None) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", byte_range or "")
        if match is None or not self.server.ranges:
            length = self.server.claimed_length or len(content)
            self._respond(200, {"Content-Length": str(length)} if self.server.lengths else {}, content)
        elif (start := int(match[1])) >= len(content):
            self._respond(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
        else:
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers = {"Content-Range": content_range, "Content-Length": str(len(content) - start)}
            self._respond(206, headers, content[start:])

    def _respond(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.cuts:
            body = body[: self.server.cuts.pop(0)]
        try:
            if not self.server.delay:
                self.wfile.write(body)
            else:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(self.server.delay)
        except OSError:  # the client has closed the connection
            pass


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a server."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
