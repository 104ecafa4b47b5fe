import socket
from pathlib import Path

import pytest

from pipeline.cli import DEFAULT_MODEL
from pipeline.errors import UserError

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.serve import serve
from tests.command_line import gridcap
from tests.imports import imported_packages


@pytest.mark.slow
def test_address_in_use_is_rejected_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as error:
            serve([tmp_path / "no model"], DEFAULT_MODEL, "127.0.0.1", port)
    assert f"127.0.0.1:{port}: already in use" in str(error.value)
    assert "--port" in str(error.value)


def test_address_of_another_machine_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0: cannot be used"):
        serve([tmp_path / "no model"], DEFAULT_MODEL, "192.0.2.1", 0)


@pytest.mark.slow
def test_folder_without_a_model_is_rejected_before_the_server_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        serve([tmp_path], DEFAULT_MODEL, "127.0.0.1", 0)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_invalid_port_is_rejected(port: str) -> None:
    result = gridcap("app", "--port", port)
    assert result.exit_code == 2
    assert "--port" in result.output


@pytest.mark.slow
def test_the_first_page_imports_neither_the_compiler_nor_unused_packages() -> None:
    packages = ["torch._dynamo", "sympy", "torchvision", "altair", "matplotlib", "scipy", "spacy", "dvc"]
    program = "from pipeline.app import captioning, training, upload_store, uploads"
    assert imported_packages(program, packages) == []
