import io
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline.captions.records import Record, write_records
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.features.images import View
from pipeline.features.store import EncoderSpec, FeatureStore, Grids, write_index, write_shard
from pipeline.features.visualize import SAMPLED_IMAGES, draw_grid, fit_color_map
from tests.factories import small_spec

SETTING = small_spec(image_size=64, grid_width=3, channels=4)
ORANGE, TEAL = (200, 100, 50), (20, 120, 110)
PARAMS = """
dataset:
  format: coco
  root: {root}
  images: pictures
  captions: [{{file: captions.json, folder: ".", split: train}}]
  splits: null
  missing_images: error
  bad_captions: error
"""


def write_store(folder: Path, grids: Grids, spec: EncoderSpec = SETTING, views: Sequence[View] = ("whole",)) -> Path:
    """A store of one image a row, with ids from 1; further views are all zeros."""
    ids = list(range(1, len(grids) + 1))
    rows = [sha256(picture(image_id)).hexdigest() for image_id in ids]
    shards = [
        write_shard(folder, spec, ids, [(row, view) for row in rows], grids if place == 0 else np.zeros_like(grids))
        for place, view in enumerate(views)
    ]
    write_index(folder, spec, views, shards, dict(zip(ids, rows, strict=True)))
    return folder


def two_areas() -> Grids:
    """Three images whose region in row 0, column 2 differs from all others."""
    grids = np.tile(np.array([1, 2, 0, 0], dtype=np.float16), (3, 6, 1))
    grids[:, 2] = (5, 0, 0, 1)
    return grids


def picture(image_id: int) -> bytes:
    """A PNG file, orange in the left half and teal in the right, with bytes of its own after its end."""
    pixels = np.full((32, 48, 3), ORANGE, dtype=np.uint8)
    pixels[:, 24:] = TEAL
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue() + image_id.to_bytes(2)


def write_dataset(folder: Path) -> None:
    """Images 1 to 3, and records and params that lead to them."""
    (folder / "pictures").mkdir(parents=True)
    for image_id in (1, 2, 3):
        (folder / f"pictures/{image_id}.png").write_bytes(picture(image_id))
    write_records(
        folder / "prepared",
        [Record(image_id=i, file=f"{i}.png", split="train", captions=("A cube .",)) for i in (1, 2, 3, 9)],
    )
    (folder / "params.yaml").write_text(PARAMS.format(root=folder))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    return tmp_path


def draw(dataset: Path, store: Path, name: str = "grid.png", image_id: int = 1) -> Path:
    draw_grid(FeatureStore(store), image_id, dataset / "prepared", dataset / "pictures", dataset / name)
    return dataset / name


def inspect(dataset: Path, *arguments: str) -> Result:
    paths = ["--prepared", str(dataset / "prepared"), "--params", str(dataset / "params.yaml")]
    return CliRunner().invoke(app, ["inspect", str(dataset / "features"), *arguments, *paths])


def panels(path: Path) -> list[np.ndarray]:
    """The picture, the colors and the norms of a drawing: uint8 RGB, none of it white, from edge to edge."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = []
    inked = (pixels < 255).any(axis=-1)
    for left, right in runs(inked[len(pixels) // 2])[:3]:
        top, bottom = max(runs(inked[:, (left + right) // 2]), key=np.ptp)
        # The edge may be half a pixel wide.
        found.append(pixels[top + 1 : bottom - 1, left + 1 : right - 1])
    return found


def runs(inked: np.ndarray) -> list[tuple[int, int]]:
    """Begin and end of each run of ink."""
    changes = np.flatnonzero(np.diff(inked, prepend=False, append=False))
    return [(int(begin), int(end)) for begin, end in changes.reshape(-1, 2)]


def cells(panel: np.ndarray) -> np.ndarray:
    """Colors of a panel of 2 x 3 cells, each of them of one color but for its edges: [2, 3, 3]."""
    height, width = len(panel) / 2, panel.shape[1] / 3
    assert abs(2 * height - 3 * width) < 4
    found = np.empty((2, 3, 3), dtype=np.uint8)
    for row, column in np.ndindex(2, 3):
        cell = panel[
            round(row * height) + 3 : round((row + 1) * height) - 3,
            round(column * width) + 3 : round((column + 1) * width) - 3,
        ]
        found[row, column] = cell[0, 0]
        assert (cell == cell[0, 0]).all()
    return found


def test_areas_of_other_features_have_other_colors_in_their_places(dataset: Path) -> None:
    grids = two_areas()
    _, colors, _ = panels(draw(dataset, write_store(dataset / "features", grids)))
    found = cells(colors)
    assert np.array_equal(found.reshape(6, 3), fit_color_map(grids).colors(grids[0]))
    assert (found == found[0, 2]).all(axis=-1).tolist() == [[False, False, True], [False, False, False]]
    assert (found == found[0, 0]).all(axis=-1).sum() == 5


def test_the_picture_is_a_square_of_the_first_view(dataset: Path) -> None:
    plain, _, _ = panels(draw(dataset, write_store(dataset / "features", two_areas())))
    flipped, _, _ = panels(draw(dataset, write_store(dataset / "other", two_areas(), views=("whole_flipped", "whole"))))
    for picture, colors in ((plain, (ORANGE, TEAL)), (flipped, (TEAL, ORANGE))):
        side = len(picture)
        assert abs(picture.shape[1] - side) < 4
        # Where they meet a few of the 64 columns mix both.
        assert (picture[:, : round(0.45 * side)] == colors[0]).all()
        assert (picture[:, round(0.55 * side) :] == colors[1]).all()


def test_norms_are_drawn_from_lowest_to_highest(dataset: Path) -> None:
    grids = np.zeros((3, 6, 4), dtype=np.float16)
    grids[0, 4] = (3, 0, 4, 0)
    grids[0, 5] = (-4.5, 0, 0, 0)
    _, _, norms = panels(draw(dataset, write_store(dataset / "features", grids)))
    found = cells(norms)
    purple, yellow = [68, 1, 84], [253, 231, 36]  # the ends of viridis
    assert found[1, 1].tolist() == yellow
    assert [found[row, column].tolist() for row, column in np.ndindex(2, 3) if row == 0 or column == 0] == [purple] * 4
    assert found[1, 2].tolist() not in (purple, yellow)


def test_the_same_store_gives_the_same_bytes(dataset: Path) -> None:
    grids = np.random.default_rng(1).standard_normal((3, 6, 4)).astype(np.float16)
    store = write_store(dataset / "features", grids)
    first, second = (draw(dataset, store, name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert "Software" not in image.info
    assert draw(dataset, store, "c.png", image_id=2).read_bytes() != first.read_bytes()


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    grids = (np.random.default_rng(1).standard_normal((300, 6, 7)) * np.arange(1, 8)).astype(np.float16)
    regions = grids.reshape(-1, 7).astype(np.float64)
    _, singular, vectors = np.linalg.svd(regions - regions.mean(axis=0))
    color_map = fit_color_map(grids)
    assert np.allclose(color_map.shares, (singular**2 / (singular**2).sum())[:3])
    assert np.allclose(np.abs((color_map.components * vectors[:3].T).sum(axis=0)), 1)
    assert (color_map.components.max(axis=0) == np.abs(color_map.components).max(axis=0)).all()


def test_the_signs_of_components_are_fixed() -> None:
    grids = np.random.default_rng(1).standard_normal((5, 6, 7)).astype(np.float16)
    assert np.allclose(fit_color_map(grids).components, fit_color_map(-grids).components)


def test_a_few_outliers_leave_the_colors_of_the_others_apart() -> None:
    grids = np.linspace(0, 1, 1000, dtype=np.float16).reshape(100, 10, 1)
    grids[0, 0] = 1000
    red = fit_color_map(grids).colors(grids.reshape(-1, 1))[:, 0].astype(int)
    assert red[0] == 255
    assert red[900] - red[100] == pytest.approx(0.8 * 255, rel=0.05)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_components_that_there_are_not_are_zeros(dataset: Path, channels: int) -> None:
    grids = np.random.default_rng(1).standard_normal((3, 6, channels)).astype(np.float16)
    color_map = fit_color_map(grids)
    assert color_map.components.shape == (channels, 3)
    colors = color_map.colors(grids[0])
    assert colors[:, :channels].any(axis=0).all()
    assert not colors[:, channels:].any()
    assert not color_map.shares[channels:].any()
    assert color_map.shares.sum() == pytest.approx(1)
    _, drawn, _ = panels(draw(dataset, write_store(dataset / "features", grids, replace(SETTING, channels=channels))))
    assert np.array_equal(cells(drawn).reshape(6, 3), colors)


def test_rounding_makes_no_colors() -> None:
    along_a_line = two_areas().astype(np.float64) * 0.1
    colors = fit_color_map(along_a_line.astype(np.float16)).colors(along_a_line[0].astype(np.float16))
    assert not colors[:, 1:].any()
    rare = np.ones((50, 6, 3), dtype=np.float16) / 3
    rare[0, 0] = 7
    assert not fit_color_map(rare).colors(rare[1]).any()


def test_a_store_without_any_variance_is_drawn(dataset: Path) -> None:
    store = write_store(dataset / "features", np.full((3, 6, 4), 0.1, dtype=np.float16))
    title = draw_grid(FeatureStore(store), 1, dataset / "prepared", dataset / "pictures", dataset / "grid.png")
    assert "hold 0.0%, 0.0%, 0.0% of the variance" in title
    assert not cells(panels(dataset / "grid.png")[1]).any()


def test_a_sample_of_a_large_store_is_spread_evenly(dataset: Path) -> None:
    images = 3 * SAMPLED_IMAGES
    spec = replace(SETTING, grid_height=1, grid_width=1)
    grids = np.zeros((images, 1, 4), dtype=np.float16)
    # A sample of one end, or of every second image, would have other shares of the two directions.
    grids[::2, 0, 0] = 1
    grids[images // 2 :, 0, 1] = 8
    store = write_store(dataset / "features", grids, spec)
    title = draw_grid(FeatureStore(store), 1, dataset / "prepared", dataset / "pictures", dataset / "grid.png")
    shares = fit_color_map(grids).shares
    assert f"hold {shares[0]:.1%}, {shares[1]:.1%}, 0.0% of the variance in {SAMPLED_IMAGES} images" in title


def test_the_command_draws_and_tells_the_title(dataset: Path) -> None:
    write_store(dataset / "features", two_areas())
    done = inspect(dataset, "--image", "2", "--out", str(dataset / "new/grid.png"))
    assert done.exit_code == 0, done.output
    assert done.output == (
        f"{dataset}/new/grid.png: image 2: 2.png resnet18, layer3: 2 x 3 regions of 4 channels;"
        " three components hold 100.0%, 0.0%, 0.0% of the variance in 3 images\n"
    )
    assert len(panels(dataset / "new/grid.png")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "1"), "--image and --out go together"),
        (("--out", "grid.png"), "--image and --out go together"),
        (("--image", "1", "--out", "grid.jpg"), "grid.jpg: is no name for a PNG file"),
        (("--image", "4", "--out", "grid.png"), "{dataset}/prepared/records.jsonl: has no image 4; name one that it"),
        (
            ("--image", "9", "--out", "grid.png"),
            "{dataset}/features/index.json: has no image 9; run `dvc repro encode`",
        ),
        (("--image", "3", "--out", "grid.png"), "{dataset}/pictures/3.png: cannot be read"),
        (("--image", "1", "--out", "{dataset}/params.yaml/grid.png"), "{dataset}/params.yaml/grid.png: cannot be wri"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_sentence(dataset: Path, arguments: tuple[str, ...], message: str) -> None:
    write_store(dataset / "features", two_areas())
    (dataset / "pictures/3.png").unlink()
    error = inspect(dataset, *(argument.format(dataset=dataset) for argument in arguments)).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(message.format(dataset=dataset))


def test_a_file_that_is_not_the_one_encoded_is_named(dataset: Path) -> None:
    store = write_store(dataset / "features", two_areas())
    file = dataset / "pictures/2.png"
    file.write_bytes(picture(1))
    encoded, found = (sha256(picture(image_id)).hexdigest() for image_id in (2, 1))
    with pytest.raises(UserError) as error:
        draw(dataset, store, image_id=2)
    assert str(error.value) == (
        f"{file}: has SHA-256 {found}, but the grid of image 2 is of a file with {encoded}; run `dvc repro encode`"
    )
    assert not (dataset / "grid.png").exists()


def test_only_images_of_a_feature_store_are_drawn(dataset: Path) -> None:
    error = inspect(dataset, "--image", "1", "--out", str(dataset / "grid.png")).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{dataset}/features: is no feature store")


def test_grids_that_are_not_finite_are_told_in_a_sentence(dataset: Path) -> None:
    grids = two_areas()
    grids[2, 0, 0] = np.inf
    store = write_store(dataset / "features", grids)
    with pytest.raises(UserError, match="the grid of image 3 holds numbers that are not finite"):
        draw(dataset, store)


def test_a_long_name_with_dollars_is_no_formula_and_fits(dataset: Path) -> None:
    name = r"$\frac$" * 20 + ".png"
    (dataset / "pictures" / name).write_bytes(picture(1))
    write_records(dataset / "prepared", [Record(image_id=1, file=name, split="train", captions=("A cube .",))])
    with Image.open(draw(dataset, write_store(dataset / "features", two_areas()))) as image:
        title = np.asarray(image.convert("L"))[:30]
    left, right = (title < 255).any(axis=0).nonzero()[0][[0, -1]]
    assert 20 < left < right < title.shape[1] - 20
