"""`gridcap predict`: text, JSON lines, drawings of attention, and errors."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.generation.search_settings import write_search_settings
from pipeline.prediction.captioner import DEFAULT_SEARCH, Captioner
from tests.command_line import gridcap
from tests.image_files import encode_image
from tests.paths import ROOT
from tests.solid_images import solid_image
from tests.tiny_captioner import Tiny

pytestmark = pytest.mark.slow


def save_image(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(solid_image(color)))
    return path


def test_one_line_per_image_with_its_confidence(tiny: Tiny, tmp_path: Path) -> None:
    first = save_image(tmp_path / "red.png")
    folder = tmp_path / "folder"
    save_image(folder / "b.png", "blue")
    save_image(folder / "below" / "a.JPG", "white")
    result = gridcap("predict", first, folder, "--model", tiny.model)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    expected = {first: "red", folder / "b.png": "blue", folder / "below" / "a.JPG": "white"}
    for line, (path, color) in zip(lines, expected.items(), strict=True):
        name, _, caption = line.partition(": ")
        assert name == str(path)
        assert color in caption.split()
        assert 0 < float(caption.rpartition("(")[2].rstrip(")")) <= 1


def test_alternatives_are_indented_below_their_caption(tiny: Tiny, tmp_path: Path) -> None:
    path = save_image(tmp_path / "red.png")
    result = gridcap("predict", path, "--model", tiny.model, "--n-best", 3)
    first, *alternatives = result.stdout.splitlines()
    assert first.startswith(f"{path}: ")
    assert len(alternatives) == 2
    assert all(line.startswith(" " * len(str(path))) for line in alternatives)


def test_json_lines_and_a_folder_of_drawings(tiny: Tiny, tmp_path: Path) -> None:
    paths = [save_image(tmp_path / folder / "a.png") for folder in ("one", "two")]
    drawings = tmp_path / "drawings"
    options = ["--json", "--n-best", "3", "--beam-size", "4", "--attention", drawings, "--model", tiny.model]
    stdin = encode_image(solid_image("blue"))
    result = gridcap("predict", paths[0].parent, "-", paths[1], *options, stdin=stdin)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(paths[0]), "-", str(paths[1])]
    keys = ["image", "caption", "confidence", "log_probability", "score", "words", "word_probabilities", "alternatives"]
    for row in rows:
        assert list(row) == keys
        assert [list(other) for other in row["alternatives"]] == [keys[1:-1]] * 2
        assert " ".join(row["words"]) == row["caption"]
        assert 0 < row["confidence"] < 1
    assert "blue" in rows[1]["words"]
    assert sorted(path.name for path in drawings.iterdir()) == ["a-2.png", "a.png", "standard-input.png"]
    with Image.open(drawings / "a.png") as drawing:
        assert drawing.width > drawing.height


def test_the_drawing_of_one_image_is_written_to_the_named_file(tiny: Tiny, tmp_path: Path) -> None:
    path = save_image(tmp_path / "red.png")
    drawings = [tmp_path / "new" / "attention.png", tmp_path / "attention.PNG", tmp_path / "attention.svg"]
    for drawing in [*drawings, drawings[0]]:  # twice: an existing drawing is overwritten
        result = gridcap("predict", path, "--attention", drawing, "--model", tiny.model)
        assert result.exit_code == 0, result.output
    with Image.open(drawings[0]) as image:
        assert image.format == "PNG"
    assert drawings[1].read_bytes() == drawings[0].read_bytes()
    assert "<svg" in drawings[2].read_text()


def test_drawings_never_overwrite_images(tiny: Tiny, tmp_path: Path) -> None:
    image, sibling = save_image(tmp_path / "red.png"), save_image(tmp_path / "red.jpg")
    content = image.read_bytes()
    for path in (image, sibling):
        result = gridcap("predict", path, "--attention", tmp_path, "--model", tiny.model)
        assert f"{image}: already exists" in str(result.exception)
    result = gridcap("predict", image, "--attention", image, "--model", tiny.model)
    assert f"{image}: is the image itself" in str(result.exception)
    result = gridcap("predict", image, "--attention", sibling / "drawing.png", "--model", tiny.model)
    assert "drawing.png: cannot be written" in str(result.exception)
    assert image.read_bytes() == sibling.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["a.png", "b.png", "--attention", "c.png"], ["c.png", "2 images"]),
        (["a.png", "--attention", "c.gif"], ["c.gif", "PNG or SVG"]),
        (["a.jpg", "--model", "{folder}/none"], ["none/config.json"]),
        (["{folder}"], ["contains no images"]),
    ],
)
def test_unusable_arguments_are_errors(tmp_path: Path, arguments: list[str], facts: list[str]) -> None:
    result = gridcap("predict", *(argument.format(folder=tmp_path) for argument in arguments))
    assert isinstance(result.exception, UserError)
    for fact in facts:
        assert fact in str(result.exception)


def test_options_override_single_recorded_settings(tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    fingerprint = Captioner.load(tiny.model, device="cpu").config.fingerprint
    write_search_settings(tmp_path / "generated", replace(DEFAULT_SEARCH, beam_size=3, n_best=3), fingerprint)
    path = save_image(tmp_path / "red.png")

    def predict(*options: object) -> list[str]:
        result = gridcap("predict", path, "--model", model, *options)
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    assert len(predict()) == 3
    assert len(predict("--n-best", 2)) == 2
    result = gridcap("predict", path, "--model", model, "--n-best", 4)
    assert isinstance(result.exception, UserError)
    for fact in ("n_best must be at most beam_size (3), got 4", "Increase beam_size"):
        assert fact in str(result.exception)


def test_predictions_equal_those_of_the_captioner(tiny: Tiny, tmp_path: Path) -> None:
    path = save_image(tmp_path / "red.png")
    options = ["--method", "sample", "--beam-size", 1, "--temperature", 0.7, "--n-best", 3, "--seed", 4]
    result = gridcap("predict", path, "--json", "--model", tiny.model, *options)
    row = json.loads(result.stdout)
    search = replace(DEFAULT_SEARCH, method="sample", beam_size=1, temperature=0.7, n_best=3, seed=4)
    [expected] = Captioner.load(tiny.model, device="cpu").caption([path], search)
    assert row["caption"] == expected.text
    assert row["log_probability"] == expected.log_probability
    assert [other["caption"] for other in row["alternatives"]] == [other.text for other in expected.alternatives]


def test_unreadable_images_are_reported_and_the_exit_status_is_1(tiny: Tiny, tmp_path: Path) -> None:
    save_image(tmp_path / "red.png")
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "text.png").write_text("not an image")
    result = gridcap("predict", tmp_path, tmp_path / "none.jpg", "--model", tiny.model)
    assert result.exit_code == 1
    assert result.stdout.count("\n") == 1
    errors = result.stderr.splitlines()
    names = ("IMG_0001.HEIC", "text.png", "none.jpg")
    assert all(f"{tmp_path / name}: " in line for name, line in zip(names, errors, strict=True))
    assert "HEIC" in errors[0].partition(": a ")[2]
    assert all(line.startswith("error: ") for line in errors)
    result = gridcap("predict", "-", "--model", tiny.model, stdin=b"")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: -: ")


def test_an_image_that_is_too_large_is_one_error_without_warnings_of_pillow(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(path)
    monkeypatch.setattr(sys, "argv", ["gridcap", "predict", str(path), "--model", str(tiny.model)])
    with pytest.raises(SystemExit, match="1"):
        main()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
    assert "10000 x 10000 px" in line


def test_a_caption_imports_neither_the_compiler_nor_unused_packages(tiny: Tiny, tmp_path: Path) -> None:
    arguments = ["gridcap", "predict", str(save_image(tmp_path / "red.png")), "--model", str(tiny.model)]
    program = f"""
import sys
from pipeline.console import main
sys.argv = {arguments}
try:
    main()
finally:
    packages = ("torch._dynamo", "sympy", "torchvision", "matplotlib", "scipy", "spacy", "requests", "streamlit", "dvc")
    print([name for name in packages if name in sys.modules])
"""
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    caption, imported = output.splitlines()
    assert "red" in caption
    assert imported == "[]"
