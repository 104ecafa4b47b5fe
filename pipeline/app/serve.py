"""The server of the app: Streamlit on one address and port."""

import errno
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.startup import exit_at_once

_PAGE = Path(__file__).with_name("page.py")
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
_WILDCARD_HOSTS = ("0.0.0.0", "::")
"""Addresses for all interfaces of the machine; a browser cannot open them."""


def serve(models: list[Path], default_model: Path, host: str, port: int) -> None:
    """Load the models, start the server, print its address, and serve until interrupted.

    Args:
        models: Model folders.
        default_model: Model folder if `models` is empty. It may not exist yet: the training page can follow the run
            that will write it.
        host: Address to listen on.
        port: Port to listen on; 0 chooses a free port.

    Raises:
        UserError: The extra `app` is not installed, a model cannot be loaded, or the address cannot be used.
    """
    # By default, waiting OpenMP threads spin and take cores from the server and the browser. Must be set before PyTorch
    # is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from starlette.formparsers import MultiPartParser
        from starlette.middleware import Middleware
        from streamlit import App

        from pipeline.app import captioning, training, upload_store, uploads  # noqa: F401
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(
            f"gridcap app: the Python package {package} is not installed. Run `pip install 'gridcap[app]'`."
        ) from error
    _check_address(host, port)
    captioning.prepare(models or [folder for folder in [default_model] if folder.is_dir()])
    # Starlette spools larger uploads to a file.
    MultiPartParser.spool_max_size = 2 * uploads.MAX_BYTES
    options = {
        "browser.gatherUsageStats": False,
        "browser.serverAddress": socket.gethostname() if host in _WILDCARD_HOSTS else host,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
        # A full garbage collection after each interaction would visit all objects of PyTorch.
        "runner.postScriptGC": False,
        "server.address": host,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": uploads.MAX_MEGABYTES,
        # Pasted images arrive as base64, which is a third larger than the file.
        "server.maxMessageSize": 3 * uploads.MAX_MEGABYTES // 2,
        "server.maxWidgetStateSize": 3 * uploads.MAX_MEGABYTES // 2,
        "server.port": port,
        "theme.baseRadius": "large",
        "theme.dark.primaryColor": "#e07b50",
        "theme.light.primaryColor": "#c8552b",
        "theme.paddingTop": "1.5rem",
    }
    if host in _LOOPBACK_HOSTS:
        # Prevents DNS rebinding: a page of another site could otherwise reach this server under its own host name.
        options["server.allowedHosts"] = list(_LOOPBACK_HOSTS)
    upload_store.install_upload_store()
    sys.argv = [str(_PAGE), *map(str, models or [default_model])]  # as the page reads it
    sigint_handler = signal.getsignal(signal.SIGINT)

    def exit_on_signals() -> None:
        # The server would wait for uploads and captions in progress. There is nothing to finish: it writes no file.
        signal.signal(signal.SIGINT, exit_at_once if callable(sigint_handler) else sigint_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @asynccontextmanager
    async def lifespan(_: App) -> AsyncIterator[None]:
        exit_on_signals()  # the server has set handlers of its own
        yield

    exit_on_signals()
    middleware = [Middleware(upload_store.UploadLimits)]
    App(_PAGE, lifespan=lifespan, middleware=middleware).run(config=options)


def _check_address(host: str, port: int) -> None:
    """Raise `UserError` if the server could not listen on this address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "already in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
            raise UserError(f"{host}:{port}: {reason}. Choose another address with --host and --port.") from error
