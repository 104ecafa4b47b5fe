"""The captioner: from images of any kind to captions."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.captions.records import Record, write_records
from pipeline.decoder.model_io import read_model, write_model
from pipeline.errors import UserError
from pipeline.features.store import FeatureStore
from pipeline.generation.caption_io import read_captions
from pipeline.generation.generate import GenerateParams
from pipeline.generation.search import SearchParams
from pipeline.generation.search_settings import write_search_settings
from pipeline.params import check
from pipeline.prediction.captioner import DEFAULT_SEARCH, Captioner
from stages import generate_captions
from tests.defaults import default_section
from tests.image_files import encode_image
from tests.solid_images import solid_image
from tests.tiny_captioner import COLORS, Tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def captioner(tiny: Tiny) -> Captioner:
    return Captioner.load(tiny.model, device="cpu")


def image_files(tiny: Tiny) -> list[Path]:
    return sorted(tiny.images.iterdir())


def test_grids_equal_those_that_stage_encode_stored(captioner: Captioner, tiny: Tiny) -> None:
    files = image_files(tiny)[:32]
    stored = FeatureStore(tiny.features).grids(int(file.stem) for file in files)
    pixels = np.stack([captioner.read_image(file) for file in files])
    grids = captioner.encode(pixels)
    assert stored.dtype == grids.dtype == np.float16
    assert np.array_equal(grids, stored)
    # One image is encoded in a smaller batch, in which convolutions may round differently.
    for image, expected in zip(pixels[:4], stored, strict=False):
        grid = captioner.encode(image[None])[0]
        np.testing.assert_allclose(grid.astype(float), expected.astype(float), rtol=2e-3, atol=1e-5)


def test_captions_name_the_color_and_have_consistent_probabilities(captioner: Captioner) -> None:
    for color in COLORS:
        [caption] = captioner.caption([solid_image(color)])
        assert color in caption.words
        assert caption.text == " ".join(caption.words)
        assert caption.attention is not None
        assert caption.attention.shape == (len(caption.words), *captioner.config.encoder.grid)
        np.testing.assert_allclose(caption.attention.sum(axis=(1, 2)), 1, rtol=1e-5)
        # The log-probability of the caption includes `<end>`.
        words_log_probability = sum(caption.word_log_probabilities)
        assert caption.log_probability - 1e-4 <= words_log_probability <= 0
        assert caption.confidence == pytest.approx(math.exp(words_log_probability / len(caption.words)))


def test_a_truncated_caption_has_the_probability_of_its_words(captioner: Captioner) -> None:
    [caption] = captioner.caption([solid_image()], replace(DEFAULT_SEARCH, max_length=2))
    assert len(caption.words) == 2
    assert sum(caption.word_log_probabilities) == pytest.approx(caption.log_probability, abs=1e-5)


def test_a_file_its_bytes_and_its_pillow_image_get_the_same_caption(captioner: Captioner, tiny: Tiny) -> None:
    file = image_files(tiny)[3]
    with Image.open(file) as image:
        captions = captioner.caption([file, str(file), file.read_bytes(), image])
    assert len({(caption.text, caption.log_probability) for caption in captions}) == 1


def test_captions_do_not_depend_on_the_other_images(captioner: Captioner, tiny: Tiny) -> None:
    files = image_files(tiny)[:5]
    sampling = replace(SearchParams.greedy(6), method="sample", n_best=3, seed=5)
    for search in (DEFAULT_SEARCH, sampling):
        together = captioner.caption(files, search)
        one_by_one = [captioner.caption([file], search)[0] for file in reversed(files)][::-1]
        assert [caption.text for caption in one_by_one] == [caption.text for caption in together]
    texts = {text for caption in together for text in (caption.text, *(other.text for other in caption.alternatives))}
    assert len(texts) > len(COLORS)


def test_alternatives_are_the_further_captions_of_the_beam(captioner: Captioner) -> None:
    [best] = captioner.caption([solid_image()], replace(DEFAULT_SEARCH, beam_size=4, n_best=4))
    captions = [best, *best.alternatives]
    assert len({caption.words for caption in captions}) == 4
    scores = [caption.score for caption in captions]
    assert scores == sorted(scores, reverse=True)
    for caption in captions:
        assert caption.attention is not None
        assert len(caption.word_log_probabilities) == len(caption.words) == len(caption.attention)
    [single] = captioner.caption([solid_image()], replace(DEFAULT_SEARCH, beam_size=4))
    assert single.alternatives == ()


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image.convert("L"),
        lambda image: image.convert("LA"),
        lambda image: image.convert("RGBA"),
        lambda image: image.convert("CMYK"),
        lambda image: image.convert("P"),
        lambda image: image.convert("1"),
        lambda image: image.resize((1, 1)),
        lambda image: image.resize((900, 3)),
    ],
)
def test_images_of_any_mode_and_size_are_captioned(
    captioner: Captioner, convert: Callable[[Image.Image], Image.Image]
) -> None:
    [caption] = captioner.caption([convert(solid_image("white"))])
    assert "white" in caption.words


def test_images_are_rotated_by_their_exif_orientation(captioner: Captioner) -> None:
    upright = Image.new("RGB", (40, 20), COLORS["blue"])
    upright.paste(COLORS["red"], (0, 0, 20, 20))
    rotated = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = captioner.read_image(upright)
    assert np.array_equal(captioner.read_image(encode_image(rotated, exif=exif)), expected)
    rotated.info["exif"] = exif.tobytes()
    assert np.array_equal(captioner.read_image(rotated), expected)


def test_unreadable_images_are_reported_and_the_others_captioned(captioner: Captioner, tmp_path: Path) -> None:
    large, bomb = encode_image(Image.new("1", (9_400, 9_400))), encode_image(Image.new("1", (20_000, 20_000)))
    truncated = encode_image(solid_image())[:60]
    images = [solid_image("red"), large, bomb, truncated, tmp_path / "none.jpg", b"", solid_image("white")]
    first, *failures, last = captioner.stream(images)
    assert not isinstance(first, UserError)
    assert not isinstance(last, UserError)
    assert "red" in first.words
    assert "white" in last.words
    names = ["image 2", "image 3", "image 4", "none.jpg", "image 6"]
    for failure, name in zip(failures, names, strict=True):
        assert isinstance(failure, UserError)
        assert name in str(failure)
    with pytest.raises(UserError, match="image 2"):
        captioner.caption(images)


@pytest.mark.parametrize("size", [(0, 0), (0, 20), (20, 0)])
def test_an_image_without_pixels_is_an_error(captioner: Captioner, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"^image 2: .*{size[0]} x {size[1]} px"):
        captioner.caption([solid_image(), Image.new("RGB", size)])


def test_a_single_image_instead_of_a_list_is_an_error(captioner: Captioner, tiny: Tiny) -> None:
    file = image_files(tiny)[0]
    for image in (str(file), file.read_bytes(), file, solid_image()):
        with pytest.raises(TypeError, match=rf"must be a list.*not {type(image).__name__}"):
            captioner.caption(image)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a list"):
            next(captioner.stream(image))  # type: ignore[arg-type]


def test_an_ensemble_averages_word_probabilities(captioner: Captioner, tiny: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "ensemble" / "other"
    shutil.copytree(tiny.model, other)
    model = read_model(other)
    weights = {name: weight * 0.97 for name, weight in model.decoder.state_dict().items()}
    write_model(other, weights, model.vocabulary, model.config)
    captioners = (captioner, Captioner.load(other), Captioner.load(tiny.model, ensemble=tmp_path / "ensemble"))
    [[first], [second], [ensemble]] = (loaded.caption([solid_image()], SearchParams.greedy(1)) for loaded in captioners)
    assert first.words == second.words == ensemble.words
    mean = (first.word_probabilities[0] + second.word_probabilities[0]) / 2
    assert ensemble.word_probabilities[0] == pytest.approx(mean)
    assert math.exp(ensemble.log_probability) == pytest.approx(mean)


def test_an_ensemble_folder_without_models_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: contains no model folder"):
        Captioner.load(tiny.model, ensemble=tmp_path)


def test_an_unknown_view_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"view": "whole"', '"view": "left"'))
    with pytest.raises(UserError, match=r"config\.json: view: .*'whole'"):
        Captioner.load(folder)


def test_models_without_recorded_settings_have_the_default_search(captioner: Captioner) -> None:
    assert captioner.search == DEFAULT_SEARCH


def default_search() -> SearchParams:
    """Return the search settings of params.yaml."""
    return check(default_section("generate"), "generate", GenerateParams, "params.yaml").search


def write_params(path: Path, **search: object) -> None:
    values = default_section("generate")
    lines = [f"  {key}: {value}" for key, value in {"split": "train", "ensemble": str(path.parent / "none")}.items()]
    lines += ["  search:", *(f"    {key}: {value}" for key, value in (values["search"] | search).items())]
    path.write_text("\n".join(["generate:", *lines, ""]).replace("False", "false"))
    (path.parent / "none").mkdir()


def test_prediction_starts_from_the_settings_of_the_generated_captions(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    params = tmp_path / "params.yaml"
    write_params(params, beam_size=2, n_best=2, length_normalization="gnmt", length_alpha=0.3)
    files = image_files(tiny)[:4]
    records = [
        Record(image_id=int(file.stem), file=file.name, split="train", captions=("a red thing",)) for file in files
    ]
    write_records(tmp_path / "prepared", records)
    generate_captions.main(
        params=params,
        prepared=tmp_path / "prepared",
        features=tiny.features,
        trained=tmp_path / "model",
        model=tmp_path / "model",
        out=tmp_path / "generated",
        device="cpu",
    )
    captioner = Captioner.load(tmp_path / "model", device="cpu")
    assert captioner.search == replace(
        default_search(), beam_size=2, n_best=2, length_normalization="gnmt", length_alpha=0.3
    )
    generated = read_captions(tmp_path / "generated", "en")
    for image, caption in zip(generated, captioner.caption(files), strict=True):
        assert caption.text == image.best.text
        assert caption.score == pytest.approx(image.best.score, abs=1e-4)
        assert [other.text for other in caption.alternatives] == [other.text for other in image.captions[1:]]
        np.testing.assert_allclose(caption.attention, image.attention, atol=2e-3)
    assert Captioner.load(tiny.model, device="cpu").search == DEFAULT_SEARCH


def test_settings_recorded_with_another_model_are_not_used(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "model")
    write_search_settings(tmp_path / "generated", SearchParams.greedy(3), "another training run")
    assert Captioner.load(tmp_path / "model", device="cpu").search == DEFAULT_SEARCH
