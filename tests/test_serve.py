import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.errors import UserError

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.serve import serve


def test_address_in_use_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError) as refusal:
            serve([tmp_path / "no model"], "127.0.0.1", port)
    assert f"127.0.0.1:{port}: already in use" in str(refusal.value)
    assert "--port" in str(refusal.value)


def test_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1:0: cannot be used"):
        serve([tmp_path / "no model"], "192.0.2.1", 0)


def test_folder_without_a_model_is_refused_before_the_server_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        serve([tmp_path], "127.0.0.1", 0)
    assert str(tmp_path / "config.json") in str(refusal.value)


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_invalid_port_is_refused(port: str) -> None:
    result = CliRunner().invoke(app, ["app", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.output
