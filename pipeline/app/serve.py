"""The server of the app: Streamlit on one address, with the pages beside this module."""

import errno
import os
import socket
from pathlib import Path

from pipeline.errors import UserError

_PAGE = Path(__file__).with_name("page.py")
_USUAL_MODEL = Path("data/model")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What no browser can open, since it stands for all addresses of the machine.
_EVERY_ADDRESS = ("0.0.0.0", "::")


def serve(models: list[Path], host: str, port: int) -> None:
    """Serve the app for some model folders until it is interrupted, and say its address when it is up.

    What the first visitor would wait for is done before. Where no folder is named, it is the one that `train` writes,
    if need be later: the first run can be watched. Raises `UserError` where the extra `app` is not installed, a model
    does not load, or the address cannot be had.
    """
    # Threads of PyTorch that wait for each other spin, and take the cores from the server and the browser: with other
    # work on two cores, ResNet-50 took 20 times as long. Read when PyTorch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from starlette.formparsers import MultiPartParser
        from streamlit.web import cli

        from pipeline.app import captioning, training, uploads  # noqa: F401
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise UserError(f"gridcap app needs {package}; install it with `pip install 'gridcap[app]'`") from error
    _check_free(host, port)
    captioning.prepare(models or [folder for folder in [_USUAL_MODEL] if folder.is_dir()])
    # Beyond this an upload would pass through a file.
    MultiPartParser.spool_max_size = 2 * uploads.MAX_BYTES
    settings = {
        "browser.gatherUsageStats": False,
        "browser.serverAddress": socket.gethostname() if host in _EVERY_ADDRESS else host,
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
        # It goes through all of PyTorch's objects for each picture; Python's own collections do.
        "runner.postScriptGC": False,
        "server.address": host,
        "server.fileWatcherType": "none",
        "server.headless": True,
        "server.maxUploadSize": uploads.MAX_MEGABYTES,
        # What is pasted comes as text, a third longer, in a message of the session.
        "server.maxWidgetStateSize": 2 * uploads.MAX_MEGABYTES,
        "server.port": port,
        "theme.baseRadius": "large",
        "theme.dark.primaryColor": "#e07b50",
        "theme.light.primaryColor": "#c8552b",
        "theme.paddingTop": "1.5rem",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    if host in _LOOPBACK:
        # No other site can then have its name lead here and its page speak with this server.
        flags += [f"--server.allowedHosts={name}" for name in _LOOPBACK]
    cli.main(["run", *flags, str(_PAGE), "--", *map(str, models or [_USUAL_MODEL])], prog_name="streamlit")


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            found = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
            raise UserError(f"address {host}, port {port} {found}; choose others with --host and --port") from error
