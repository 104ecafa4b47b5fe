import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.captions.records import read_records
from tests.dataset_files import FOUR_CAPTIONS, dataset_section, touch, touch_four_images, write_numbered_captions
from tests.paths import ROOT

pytestmark = pytest.mark.slow

OUTPUTS = ("prepared/records.jsonl", "prepare.json", "images.json")


def run_stage(folder: Path, params: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.prepare_captions", "--params", str(params)]
    command += ["--out", str(folder / "prepared"), "--metrics", str(folder / "prepare.json")]
    command += ["--image-digest", str(folder / "images.json")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_output_bytes_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    data = tmp_path / "data"
    touch(data, *(f"{index}_a.jpg" for index in range(12)))
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"dataset": dataset_section(data)}))
    outputs = []
    for order in (list(range(12)), random.Random(1).sample(range(12), 12)):
        write_numbered_captions(data, order)
        result = run_stage(tmp_path, params)
        assert result.returncode == 0, result.stderr
        outputs.append([(tmp_path / name).read_bytes() for name in OUTPUTS])
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0][1])["num_images"] == {"train": 6, "val": 3, "test": 3}
    assert {path.name for path in tmp_path.iterdir()} == {
        "data",
        "params.yaml",
        "prepared",
        "prepare.json",
        "images.json",
    }


def test_a_fault_exits_with_2_and_keeps_the_published_records(tmp_path: Path) -> None:
    data = tmp_path / "data"
    touch_four_images(data)
    (data / "captions.txt").write_text(FOUR_CAPTIONS)
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"dataset": dataset_section(data)}))
    assert run_stage(tmp_path, params).returncode == 0
    (data / "b.jpg").unlink()
    result = run_stage(tmp_path, params)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "b.jpg" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(read_records(tmp_path / "prepared")) == 4
