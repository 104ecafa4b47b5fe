import errno
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from pipeline.artifacts import write_json
from pipeline.cli import app, main
from pipeline.decoder.model_io import read_model, record_provenance, write_model
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.generate import GenerateParams
from pipeline.generation.search import SearchParams
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import compute_metrics, summarize_scores
from pipeline.metrics.tokenizers import build_corpora
from pipeline.params import load
from pipeline.prediction.captioner import USUAL_SEARCH, Captioner
from pipeline.prediction.inputs import find_inputs
from tests.tiny_captioner import COLORS, Tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def captioner(tiny: Tiny) -> Captioner:
    return Captioner.load(tiny.model, device="cpu")


def pictures(tiny: Tiny) -> list[Path]:
    return sorted(tiny.images.iterdir())


def a_picture(color: str = "red", size: tuple[int, int] = (28, 20)) -> Image.Image:
    return Image.new("RGB", size, COLORS[color])


def png(picture: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def test_grids_are_those_that_encode_stored_bit_for_bit(captioner: Captioner, tiny: Tiny) -> None:
    files = pictures(tiny)[:32]
    stored = FeatureStore(tiny.features).grids(int(file.stem) for file in files)
    squares = np.stack([captioner.pixels(file) for file in files])

    assert stored.dtype == captioner.grids(squares).dtype == np.float16
    assert np.array_equal(captioner.grids(squares), stored)
    # A lone picture goes in a smaller batch, in which convolutions may round otherwise.
    for square, grid in zip(squares[:4], stored, strict=False):
        np.testing.assert_allclose(captioner.grids(square[None])[0].astype(float), grid.astype(float), rtol=2e-3)


def test_captions_name_the_colors_and_tell_what_they_are_worth(captioner: Captioner) -> None:
    for color in COLORS:
        [caption] = captioner.caption([a_picture(color)])
        assert color in caption.words
        assert caption.text == " ".join(caption.words)
        assert caption.attention.shape == (len(caption.words), *captioner.config.encoder.grid)
        np.testing.assert_allclose(caption.attention.sum(axis=(1, 2)), 1, rtol=1e-5)
        # The search counts the end, too.
        of_words = sum(math.log(p) for p in caption.word_probabilities)
        assert caption.log_probability - 1e-4 <= of_words <= 0
        assert caption.confidence == pytest.approx(math.exp(of_words / len(caption.words)))


def test_a_caption_cut_short_has_the_probability_of_its_words(captioner: Captioner) -> None:
    [caption] = captioner.caption([a_picture()], replace(USUAL_SEARCH, max_length=2))
    assert len(caption.words) == 2
    assert sum(math.log(p) for p in caption.word_probabilities) == pytest.approx(caption.log_probability, abs=1e-5)


def test_a_file_its_bytes_and_its_picture_get_one_caption(captioner: Captioner, tiny: Tiny) -> None:
    file = pictures(tiny)[3]
    with Image.open(file) as picture:
        captions = captioner.caption([file, str(file), file.read_bytes(), picture])
    assert len({(one.text, one.log_probability) for one in captions}) == 1


def test_a_caption_does_not_depend_on_what_stands_beside_it(captioner: Captioner, tiny: Tiny) -> None:
    files = pictures(tiny)[:5]
    drawn = replace(SearchParams.greedy(6), method="sample", n_best=3, seed=5)
    for search in (USUAL_SEARCH, drawn):
        together = captioner.caption(files, search)
        alone = [captioner.caption([file], search)[0] for file in reversed(files)][::-1]
        assert [one.text for one in alone] == [one.text for one in together]
    texts = {one.text for caption in together for one in (caption, *caption.alternatives)}
    assert len(texts) > len(COLORS)


def test_alternatives_are_the_rest_of_the_beam(captioner: Captioner) -> None:
    [caption] = captioner.caption([a_picture()], replace(USUAL_SEARCH, beam_size=4, n_best=4))
    found = [caption, *caption.alternatives]
    assert len({one.words for one in found}) == 4
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert all(len(one.word_probabilities) == len(one.words) == len(one.attention) for one in found)
    assert captioner.caption([a_picture()], replace(USUAL_SEARCH, beam_size=4))[0].alternatives == ()


@pytest.mark.parametrize(
    "convert",
    [
        lambda picture: picture.convert("L"),
        lambda picture: picture.convert("LA"),
        lambda picture: picture.convert("RGBA"),
        lambda picture: picture.convert("CMYK"),
        lambda picture: picture.convert("P"),
        lambda picture: picture.convert("1"),
        lambda picture: picture.resize((1, 1)),
        lambda picture: picture.resize((900, 3)),
    ],
)
def test_pictures_of_all_kinds_get_a_caption(
    captioner: Captioner, convert: Callable[[Image.Image], Image.Image]
) -> None:
    [caption] = captioner.caption([convert(a_picture("white"))])
    assert "white" in caption.words


def test_the_camera_says_which_side_is_up(captioner: Captioner) -> None:
    upright = Image.new("RGB", (40, 20), COLORS["blue"])
    upright.paste(COLORS["red"], (0, 0, 20, 20))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(captioner.pixels(png(turned, exif=exif)), captioner.pixels(png(upright)))
    turned.info["exif"] = exif.tobytes()
    assert np.array_equal(captioner.pixels(turned), captioner.pixels(upright))


def test_bombs_and_broken_files_are_told_and_the_rest_is_captioned(captioner: Captioner, tmp_path: Path) -> None:
    large, bomb = png(Image.new("1", (9_400, 9_400))), png(Image.new("1", (20_000, 20_000)))
    cut = png(a_picture())[:60]
    images = [a_picture("red"), large, bomb, cut, tmp_path / "none.jpg", b"", a_picture("white")]
    first, *errors, last = captioner.stream(images)
    assert not isinstance(first, UserError)
    assert not isinstance(last, UserError)
    assert ("red" in first.words, "white" in last.words) == (True, True)
    told = ["image 2: .* 80 million", "image 3: .* bomb", "image 4", r"none\.jpg: .*No such file", "image 6"]
    for error, message in zip(errors, told, strict=True):
        assert isinstance(error, UserError)
        with pytest.raises(UserError, match=message):
            raise error
    with pytest.raises(UserError, match="image 2"):
        captioner.caption(images)


@pytest.mark.parametrize("size", [(0, 0), (0, 20), (20, 0)])
def test_a_picture_without_pixels_is_refused(captioner: Captioner, size: tuple[int, int]) -> None:
    width, height = size
    with pytest.raises(UserError, match=rf"^image 2: cannot be read as a picture \({width} x {height} px\)"):
        captioner.caption([a_picture(), Image.new("RGB", size)])


def test_a_picture_in_no_list_is_refused(captioner: Captioner, tiny: Tiny) -> None:
    file = pictures(tiny)[0]
    for uncaptioned_images in (str(file), file.read_bytes(), file, a_picture()):
        with pytest.raises(TypeError, match=rf"give \[picture\], not a bare {type(uncaptioned_images).__name__}"):
            captioner.caption(uncaptioned_images)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="come in a list"):
            next(captioner.stream(uncaptioned_images))  # type: ignore[arg-type]


def test_several_models_vote(captioner: Captioner, tiny: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "more" / "other"
    shutil.copytree(tiny.model, other)
    model = read_model(other)
    weights = {name: weight * 0.97 for name, weight in model.decoder.state_dict().items()}
    write_model(other, weights, model.vocabulary, model.config)
    both = Captioner.load(tiny.model, ensemble=tmp_path / "more")
    picture, search = a_picture(), SearchParams.greedy(1)
    [alone], [second], [voted] = (one.caption([picture], search) for one in (captioner, Captioner.load(other), both))
    assert alone.words == second.words == voted.words
    mean = (alone.word_probabilities[0] + second.word_probabilities[0]) / 2
    assert voted.word_probabilities[0] == pytest.approx(mean)
    assert math.exp(voted.log_probability) == pytest.approx(mean)


def test_an_ensemble_without_models_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model folder; put copies of models into it"):
        Captioner.load(tiny.model, ensemble=tmp_path)


def test_the_usual_search_is_that_of_params_yaml() -> None:
    assert load(ROOT / "params.yaml", "generate", GenerateParams).search == USUAL_SEARCH


@pytest.fixture
def moved(tiny: Tiny, tmp_path: Path) -> Path:
    """The model where the weights of its encoder are not to be found."""
    folder = tmp_path / "clone" / "data" / "model"
    shutil.copytree(tiny.model, folder)
    record_provenance(folder, "images", "weights/encoder.safetensors")
    return folder


def test_a_view_that_nobody_knows_is_refused(moved: Path) -> None:
    config = moved / "config.json"
    config.write_text(config.read_text().replace('"view": "whole"', '"view": "left"'))
    with pytest.raises(UserError, match=r"config\.json: view must be one of whole, .*, got left"):
        Captioner.load(moved)


def test_weights_that_are_nowhere_are_asked_for(moved: Path) -> None:
    with pytest.raises(UserError, match=r"needs the weights .*resnet18 up to layer2.* weights/encoder\.safetensors"):
        Captioner.load(moved)


def test_weights_are_found_from_a_folder_above_the_model(moved: Path, tiny: Tiny) -> None:
    place = moved.parents[1] / "weights" / "encoder.safetensors"
    place.parent.mkdir()
    shutil.copy(tiny.weights, place)
    assert "red" in Captioner.load(moved).caption([a_picture()])[0].words
    weights = load_file(tiny.weights)
    weights["conv1.weight"] += 1
    save_file(weights, place)
    with pytest.raises(UserError, match=r"encoder\.safetensors \(of another digest\)"):
        Captioner.load(moved)


def test_weights_of_torchvision_are_found_in_the_cache_and_not_downloaded(
    moved: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    record_provenance(moved, "images", "IMAGENET1K_V1")
    with pytest.raises(UserError, match=r"checkpoints/resnet18-f37072fd\.pth.*--download"):
        Captioner.load(moved)
    checkpoints = tmp_path / "cache" / "hub" / "checkpoints"
    assert not checkpoints.exists()
    checkpoints.mkdir(parents=True)
    torch.save(load_file(tiny.weights), checkpoints / "resnet18-f37072fd.pth")
    assert "red" in Captioner.load(moved).caption([a_picture()])[0].words


@pytest.mark.parametrize("named", ["nowhere.safetensors", "."])
def test_weights_that_are_named_and_cannot_be_read_are_told_with_their_flag(
    tiny: Tiny, tmp_path: Path, named: str
) -> None:
    given, picture = tmp_path / named, pictures(tiny)[0]
    result = gridcap("predict", picture, "--model", tiny.model, "--encoder-weights", given)
    assert str(result.exception) == (
        f"{given}: is no file that can be read; name the encoder's weights by --encoder-weights"
    )
    assert isinstance(result.exception, UserError)


def test_weights_of_another_encoder_are_refused(moved: Path, tiny: Tiny, tmp_path: Path) -> None:
    weights = load_file(tiny.weights)
    weights["conv1.weight"] += 1
    other = tmp_path / "other.safetensors"
    save_file(weights, other)
    with pytest.raises(UserError, match=r"other\.safetensors: has encoder weights of digest .*--encoder-weights"):
        Captioner.load(moved, encoder_weights=other)
    assert Captioner.load(moved, encoder_weights=tiny.weights)
    shutil.copy(other, moved / "encoder.safetensors")
    with pytest.raises(UserError, match=r"model/encoder\.safetensors: has encoder weights of digest"):
        Captioner.load(moved)
    del weights["conv1.weight"]
    save_file(weights, other)
    with pytest.raises(UserError, match=r"other\.safetensors: does not fit resnet18 up to layer2: lacks conv1\.weight"):
        Captioner.load(moved, encoder_weights=other)


def gridcap(*words: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin)


def test_predict_prints_a_line_a_picture(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(a_picture("red")))
    (tmp_path / "in" / "side").mkdir(parents=True)
    (tmp_path / "in" / "side" / "a.JPG").write_bytes(png(a_picture("white")))
    (tmp_path / "in" / "b.png").write_bytes(png(a_picture("blue")))
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    result = gridcap("predict", tmp_path / "red.png", tmp_path / "in", "--model", tiny.model)
    assert result.exit_code == 0, result.output
    names = [line.split(":")[0] for line in result.stdout.splitlines()]
    assert names == [str(tmp_path / name) for name in ("red.png", "in/b.png", "in/side/a.JPG")]
    for line, color in zip(result.stdout.splitlines(), ("red", "blue", "white"), strict=True):
        assert f" {color}" in line


def test_a_folder_stands_for_its_pictures_and_for_what_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.pdf", "c.mpg", "side/d.JPG", "closed/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "moved.png").symlink_to("elsewhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    listed = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path).name == "closed":  # the superuser, whom nothing keeps out, may run this
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = [Path(one.name).relative_to(tmp_path).as_posix() for one in find_inputs([str(tmp_path)])]
    assert found == ["a.png", "closed", "moved.png", "side/d.JPG"]


def test_predict_prints_json_and_draws_strips(tiny: Tiny, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(a_picture("red")))
    flags = ["--json", "--n-best", "3", "--beam-size", "4", "--attention", tmp_path / "strips", "--model", tiny.model]
    result = gridcap("predict", tmp_path / "one", "-", tmp_path / "two" / "a.png", *flags, stdin=png(a_picture("blue")))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["image"] for row in rows] == [str(tmp_path / "one/a.png"), "-", str(tmp_path / "two/a.png")]
    keys = ["image", "caption", "confidence", "log_probability", "score", "words", "word_probabilities", "alternatives"]
    for row in rows:
        assert list(row) == keys
        assert [list(other) for other in row["alternatives"]] == [keys[1:-1]] * 2
        assert " ".join(row["words"]) == row["caption"]
        assert 0 < row["confidence"] < 1
    assert "blue" in rows[1]["words"]
    assert sorted(path.name for path in (tmp_path / "strips").iterdir()) == ["a-2.png", "a.png", "standard-input.png"]
    with Image.open(tmp_path / "strips" / "a.png") as strip:
        assert strip.width > strip.height


def test_strips_take_no_file_away(tiny: Tiny, tmp_path: Path) -> None:
    picture, beside, content = tmp_path / "red.png", tmp_path / "red.jpg", png(a_picture("red"))
    picture.write_bytes(content)
    beside.write_bytes(content)
    for named in (picture, beside):
        result = gridcap("predict", named, "--attention", tmp_path, "--model", tiny.model)
        assert f"{picture}: exists already" in str(result.exception)
    result = gridcap("attend", picture, "--out", picture, "--model", tiny.model)
    assert f"{picture}: is the picture itself" in str(result.exception)
    result = gridcap("attend", picture, "--out", beside / "strip.png", "--model", tiny.model)
    assert "strip.png: cannot be written" in str(result.exception)
    assert picture.read_bytes() == beside.read_bytes() == content


def test_predict_tells_what_it_cannot_read_and_ends_with_1(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(a_picture("red")))
    (tmp_path / "text.png").write_text("no picture")
    result = gridcap("predict", tmp_path, tmp_path / "none.jpg", "--model", tiny.model)
    assert result.exit_code == 1
    assert result.stdout.count("\n") == 1
    assert "text.png: cannot be read as a picture" in result.stderr
    assert "none.jpg: cannot be read" in result.stderr
    result = gridcap("predict", "-", "--model", tiny.model, stdin=b"")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: -: cannot be read as a picture")


def test_a_picture_that_is_too_large_is_told_without_what_pillow_tells_programmers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large = tmp_path / "large.png"
    Image.new("1", (10_000, 10_000)).save(large)
    monkeypatch.setattr(sys, "argv", ["gridcap", "predict", str(large), "--model", str(tiny.model)])
    with pytest.raises(SystemExit, match="1"):
        main()
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {large}: cannot be read as a picture (10000 x 10000 px, more than 80 million")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://example.org/a.jpg"], r"https://example\.org/a\.jpg: is a URL"),
        (["{empty}"], r"holds no picture"),
        ([""], r"empty name"),
        (["a.jpg", "--beam-size", "0"], r"search\.beam must be greater than or equal to 1, got 0"),
        (["a.jpg", "--beam-size", "2", "--n-best", "3"], r"n_best must be at most beam, 2, got 3"),
        (["a.jpg", "--length-alpha", "much"], r"search\.length_alpha must be a valid number, got \"much\""),
        (["a.jpg", "--model", "{empty}"], r"config\.json: cannot be read"),
    ],
)
def test_predict_refuses(tmp_path: Path, words: list[str], message: str) -> None:
    result = gridcap("predict", *(word.format(empty=tmp_path) for word in words))
    assert isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=message):
        raise result.exception


def test_every_search_setting_is_a_flag() -> None:
    command = CliRunner().invoke(app, ["predict", "--help"], env={"COLUMNS": "200"})
    for name in SearchParams.__pydantic_fields__:  # type: ignore[attr-defined]
        assert f"--{name.replace('_', '-')} " in command.output


def test_attend_draws_a_strip(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "new" / "attention.png"
    result = gridcap("attend", pictures(tiny)[0], "--out", out, "--model", tiny.model)
    assert result.exit_code == 0, result.output
    with Image.open(out) as strip:
        assert strip.format == "PNG"
    capitals = tmp_path / "attention.PNG"
    assert gridcap("attend", pictures(tiny)[0], "--out", capitals, "--model", tiny.model).exit_code == 0
    assert capitals.read_bytes() == out.read_bytes()
    assert isinstance(gridcap("attend", pictures(tiny)[0], "--out", tmp_path / "a.gif").exception, UserError)
    result = gridcap("attend", pictures(tiny)[0], "--out", out / "below a file.png", "--model", tiny.model)
    assert "cannot be written" in str(result.exception)
    result = gridcap("attend", tiny.images, "--out", out)
    assert "is a folder" in str(result.exception)


def test_an_exported_model_travels(tiny: Tiny, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    references = {1: ["a red square", "red"], 2: ["a blue square", "blue"]}
    (corpus,) = build_corpora("spacy", references, [{1: "a red square", 2: "a red square"}])
    measured = compute_metrics(corpus, with_meteor=False, with_spice=False)
    write_json(scores, summarize_scores(measured, {"blue": [2]}, Resampling(bootstrap_samples=100, seed=0)))
    out = tmp_path / "out" / "model"
    result = gridcap("export", tiny.model, "--out", out, "--with-encoder", "--scores", scores)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{out}: `gridcap predict --model {out} IMAGE` captions with it; its encoder's weights are in it\n"
    )
    record_provenance(out, "images", "nowhere.safetensors")
    assert "red" in Captioner.load(out).caption([a_picture()])[0].words
    exported = load_file(out / "encoder.safetensors")
    assert not any(name.startswith(("layer3", "fc")) for name in exported)
    card = (out / "model_card.md").read_text()
    for told in (
        "| BLEU-1 | 0.8333 |",
        "| ROUGE-L | 0.8333 |",
        "BLEU-1|refs:2|tok:spacy",
        "32 images with 64 captions",
        "torch 2",
        "license",
    ):
        assert told in card
    again = gridcap("export", tiny.model, "--out", out)
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize("content", ["[]", "{}", '{"protocol": 3}', '{"protocol": {"BLEU-4": []}, "BLEU-4": null}'])
def test_scores_for_the_card_that_are_none_are_refused(tiny: Tiny, tmp_path: Path, content: str) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(content)
    result = gridcap("export", tiny.model, "--out", tmp_path / "out", "--scores", scores)
    assert f"{scores}: holds no scores" in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"protocol": {"BLEU-4": 3}, "BLEU-4": 0.5}', "protocol.BLEU-4 must be a list of texts"),
        ('{"protocol": {"BLEU-4": "words: plain"}, "BLEU-4": 0.5}', "protocol.BLEU-4 must be a list of texts"),
        ('{"protocol": {"BLEU-4": [3]}, "BLEU-4": 0.5}', "protocol.BLEU-4 must be a list of texts"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": NaN}', "BLEU-4 is nan, which is no score"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 1e999}', "BLEU-4 is inf, which is no score"),
    ],
)
def test_scores_that_no_evaluation_writes_are_refused(tiny: Tiny, tmp_path: Path, content: str, message: str) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(content)
    result = gridcap("export", tiny.model, "--out", tmp_path / "out", "--scores", scores)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"{scores}: {message}; name what `evaluate` wrote"
    assert not (tmp_path / "out").exists()


def damage(path: Path, content: bytes | None) -> None:
    """Put other bytes in a file's place, or a folder."""
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(Is a directory\)"),
        (b"", r"is no history of a training run \(.*EOF"),
        (b'[{"epoch": 1, "val_', r"is no history of a training run \(.*EOF"),
        (b"\xff\xfe[]", r"is no history of a training run \(.*Invalid JSON"),
        (b'{"epoch": 1}', r"is no history of a training run \(.*valid array"),
        (b'[{"epoch": 1, "val_loss": "low"}]', r"is no history of a training run \(0 val_loss .*number"),
        (b"[]", r"tells 0 epochs, but the weights are those after epoch \d+"),
    ],
)
def test_a_model_whose_history_is_damaged_is_not_exported(
    moved: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    damage(moved / "history.json", content)
    result = gridcap("export", moved, "--out", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    with pytest.raises(
        UserError, match=rf"history\.json: {message}.*; restore the folder as `train` or `gridcap export`"
    ):
        raise result.exception
    assert not (tmp_path / "out").exists()


def test_a_model_without_history_is_not_exported(moved: Path, tmp_path: Path) -> None:
    (moved / "history.json").unlink()
    result = gridcap("export", moved, "--out", tmp_path / "out")
    assert "history.json: cannot be read (No such file or directory); restore the folder" in str(result.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read \(Is a directory\)"),
        (b"", "is no vocabulary"),
        (b'{"schema": "grid', "is no vocabulary"),
    ],
)
def test_damaged_words_are_restored_with_their_folder(
    moved: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    damage(moved / "vocabulary.json", content)
    for words in (["predict", "a.jpg", "--model", moved], ["export", moved, "--out", tmp_path / "out"]):
        result = gridcap(*words)
        assert isinstance(result.exception, UserError)
        with pytest.raises(UserError, match=rf"vocabulary\.json: {message}.*; restore the folder as `train`") as told:
            raise result.exception
        assert "dvc" not in str(told.value)


def test_missing_words_are_restored_with_their_folder(moved: Path) -> None:
    words = moved / "vocabulary.json"
    words.unlink()
    with pytest.raises(UserError) as told:
        Captioner.load(moved)
    assert str(told.value) == f"{words}: no such file; restore the folder as `train` or `gridcap export` wrote it"


def test_a_model_without_encoder_is_a_plain_copy(tiny: Tiny, tmp_path: Path) -> None:
    assert gridcap("export", tiny.model, "--out", tmp_path / "out").exit_code == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {path.name: path.read_bytes() for path in tiny.model.iterdir()}


def test_what_an_export_leaves_behind_is_told(tiny: Tiny, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert gridcap("export", tiny.model, "--out", first, "--with-encoder").exit_code == 0
    result = gridcap("export", first, "--out", second)
    assert result.exit_code == 0, result.output
    encoder, card = result.stdout.splitlines()
    assert encoder.startswith(f"{second}: does not hold its encoder's weights")
    assert encoder.endswith("be told by --encoder-weights; export with --with-encoder to take them along")
    assert card.startswith(f"{second / 'model_card.md'}: tells no scores of other images than validation's")
    assert not (second / "encoder.safetensors").exists()


def test_an_export_that_fails_leaves_nothing(moved: Path, tmp_path: Path) -> None:
    result = gridcap("export", moved, "--out", tmp_path / "out", "--with-encoder")
    assert "needs the weights" in str(result.exception)
    assert not (tmp_path / "out").exists()
