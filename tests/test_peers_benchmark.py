"""The comparison with public repositories: skipped peers, and peers whose checkouts environment variables name."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.training import MODES, Case


def test_a_peer_without_a_checkout_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers.main(["--sgrvinod", str(tmp_path)])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning is skipped: {tmp_path} has no file")
    assert second.startswith("ruotianluo/ImageCaptioning.pytorch is skipped: no folder was given. Pass a checkout as")


def test_an_unknown_peer_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        peers.main(["--kelvinxu", "."])
    assert "--ruotianluo FOLDER" in capsys.readouterr().err


def test_integers_are_divided_as_before_pytorch_1_5() -> None:
    assert peers.divide(torch.tensor([7, 8]), 4).tolist() == [1, 2]
    assert peers.divide(torch.tensor([7.0]), 4).tolist() == [1.75]


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_checkout_trains_and_searches(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.environ.get(f"GRIDCAP_{name.upper()}")
    if folder is None:
        pytest.skip(f"GRIDCAP_{name.upper()} names no checkout of {peers.PEERS[name].repository}")
    monkeypatch.setattr(peers, "CASES", [Case(2, 8, 40, 0, 0)])
    monkeypatch.setattr(peers, "MODES", MODES[:1])
    monkeypatch.setattr(peers, "NUM_SEARCHED", 2)
    monkeypatch.setattr(peers, "SIZE", 16)
    peers.main([f"--{name}", folder, "--rounds", "1"])
    output = capsys.readouterr().out
    training, search = output.split("search, images/s")
    for table in (training, search):
        rows = {line[:40].strip(): line[40:].split() for line in table.splitlines()[1:]}
        assert "gridcap soft_attention, float32" in rows
        first = next(row for system, row in rows.items() if system.startswith(name))
        assert float(first[0]) > 0
        assert first[1] == "1.00"  # a peer relative to itself
