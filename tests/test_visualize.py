from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec, FeatureStore, Grids, write_index, write_shard
from pipeline.features.views import View
from pipeline.features.visualize import MAX_SAMPLED_IMAGES, draw_grid, fit_color_map
from tests.command_line import gridcap
from tests.factories import small_spec
from tests.image_files import encode_image

SPEC = small_spec(image_height=64, image_width=64, grid_width=3, channels=4)
ORANGE, TEAL = (200, 100, 50), (20, 120, 110)
PARAMS = """
dataset:
  format: coco
  root: {root}
  images: images
  captions: [{{file: captions.json, folder: ".", split: train}}]
  splits: null
  missing_images: error
  bad_images: error
  bad_captions: error
"""


def write_store(folder: Path, grids: Grids, spec: EncoderSpec = SPEC, views: Sequence[View] = ("whole",)) -> Path:
    """Write a store with a row for each image, with ids from 1. Views after the first are all zeros."""
    image_ids = list(range(1, len(grids) + 1))
    digests = [sha256(image_file(image_id)).hexdigest() for image_id in image_ids]
    shards = [
        write_shard(
            folder, spec, image_ids, [(digest, view) for digest in digests], grids if i == 0 else np.zeros_like(grids)
        )
        for i, view in enumerate(views)
    ]
    write_index(folder, spec, views, shards, dict(zip(image_ids, digests, strict=True)))
    return folder


def grids_with_one_odd_region() -> Grids:
    """Grids of three images whose region in row 0, column 2 differs from all others."""
    grids = np.tile(np.array([1, 2, 0, 0], dtype=np.float16), (3, 6, 1))
    grids[:, 2] = (5, 0, 0, 1)
    return grids


def image_file(image_id: int) -> bytes:
    """A PNG file, orange on the left and teal on the right, with the id appended to make its bytes unique."""
    pixels = np.full((32, 48, 3), ORANGE, dtype=np.uint8)
    pixels[:, 24:] = TEAL
    return encode_image(Image.fromarray(pixels)) + image_id.to_bytes(2)


def write_dataset(folder: Path) -> None:
    """Write images 1 to 3, records of them and of a missing image 9, and params."""
    (folder / "images").mkdir(parents=True)
    for image_id in (1, 2, 3):
        (folder / f"images/{image_id}.png").write_bytes(image_file(image_id))
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
    draw_grid(FeatureStore(store), image_id, dataset / "prepared", dataset / "images", dataset / name)
    return dataset / name


def inspect(dataset: Path, *arguments: str) -> Result:
    paths = ["--prepared", dataset / "prepared", "--params", dataset / "params.yaml"]
    return gridcap("inspect", dataset / "features", *arguments, *paths)


def panels(path: Path) -> list[np.ndarray]:
    """Crop the panels image, colors and norms from a plot: uint8 RGB, without margins. No panel may contain white."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    result = []
    is_inked = (pixels < 255).any(axis=-1)
    for left, right in find_runs(is_inked[len(pixels) // 2])[:3]:
        top, bottom = max(find_runs(is_inked[:, (left + right) // 2]), key=np.ptp)
        # An edge may cover half a pixel.
        result.append(pixels[top + 1 : bottom - 1, left + 1 : right - 1])
    return result


def find_runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return start and end of each run of True."""
    changes = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(start), int(end)) for start, end in changes.reshape(-1, 2)]


def cell_colors(panel: np.ndarray) -> np.ndarray:
    """Return the colors [2, 3, 3] of a panel of 2 x 3 cells, each of a single color up to its edges."""
    height, width = len(panel) / 2, panel.shape[1] / 3
    assert abs(2 * height - 3 * width) < 4
    colors = np.empty((2, 3, 3), dtype=np.uint8)
    for row, column in np.ndindex(2, 3):
        cell = panel[
            round(row * height) + 3 : round((row + 1) * height) - 3,
            round(column * width) + 3 : round((column + 1) * width) - 3,
        ]
        colors[row, column] = cell[0, 0]
        assert (cell == cell[0, 0]).all()
    return colors


def test_a_region_with_other_features_has_another_color(dataset: Path) -> None:
    grids = grids_with_one_odd_region()
    _, panel, _ = panels(draw(dataset, write_store(dataset / "features", grids)))
    colors = cell_colors(panel)
    assert np.array_equal(colors.reshape(6, 3), fit_color_map(grids).colors(grids[0]))
    assert (colors == colors[0, 2]).all(axis=-1).tolist() == [[False, False, True], [False, False, False]]
    assert (colors == colors[0, 0]).all(axis=-1).sum() == 5


@pytest.mark.slow
def test_the_image_is_the_square_of_the_first_view(dataset: Path) -> None:
    grids = grids_with_one_odd_region()
    whole, _, _ = panels(draw(dataset, write_store(dataset / "features", grids)))
    flipped, _, _ = panels(draw(dataset, write_store(dataset / "other", grids, views=("whole_flipped", "whole"))))
    for image, (left, right) in ((whole, (ORANGE, TEAL)), (flipped, (TEAL, ORANGE))):
        side = len(image)
        assert abs(image.shape[1] - side) < 4
        # Both colors mix in a few of the 64 columns in the middle.
        assert (image[:, : round(0.45 * side)] == left).all()
        assert (image[:, round(0.55 * side) :] == right).all()


@pytest.mark.slow
def test_norms_are_plotted_from_lowest_to_highest(dataset: Path) -> None:
    grids = np.zeros((3, 6, 4), dtype=np.float16)
    grids[0, 4] = (3, 0, 4, 0)
    grids[0, 5] = (-4.5, 0, 0, 0)
    _, _, panel = panels(draw(dataset, write_store(dataset / "features", grids)))
    colors = cell_colors(panel)
    purple, yellow = [68, 1, 84], [253, 231, 36]  # the ends of viridis
    assert colors[1, 1].tolist() == yellow
    assert [colors[row, column].tolist() for row, column in np.ndindex(2, 3) if row == 0 or column == 0] == [purple] * 4
    assert colors[1, 2].tolist() not in (purple, yellow)


@pytest.mark.slow
def test_the_same_store_gives_the_same_bytes(dataset: Path) -> None:
    grids = np.random.default_rng(1).standard_normal((3, 6, 4)).astype(np.float16)
    store = write_store(dataset / "features", grids)
    first, second = (draw(dataset, store, name) for name in ("a.png", "b.png"))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as image:
        assert "Software" not in image.info
    assert draw(dataset, store, "c.png", image_id=2).read_bytes() != first.read_bytes()


def test_components_equal_those_of_a_singular_value_decomposition() -> None:
    grids = (np.random.default_rng(1).standard_normal((300, 6, 7)) * np.arange(1, 8)).astype(np.float16)
    regions = grids.reshape(-1, 7).astype(np.float64)
    _, singular, vectors = np.linalg.svd(regions - regions.mean(axis=0))
    color_map = fit_color_map(grids)
    assert np.allclose(color_map.explained_variance, (singular**2 / (singular**2).sum())[:3])
    assert np.allclose(np.abs((color_map.components * vectors[:3].T).sum(axis=0)), 1)
    assert (color_map.components.max(axis=0) == np.abs(color_map.components).max(axis=0)).all()


def test_the_signs_of_components_are_fixed() -> None:
    grids = np.random.default_rng(1).standard_normal((5, 6, 7)).astype(np.float16)
    assert np.allclose(fit_color_map(grids).components, fit_color_map(-grids).components)


def test_outliers_do_not_compress_the_colors() -> None:
    grids = np.linspace(0, 1, 1000, dtype=np.float16).reshape(100, 10, 1)
    grids[0, 0] = 1000
    red = fit_color_map(grids).colors(grids.reshape(-1, 1))[:, 0].astype(int)
    assert red[0] == 255
    assert red[900] - red[100] == pytest.approx(0.8 * 255, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_absent_components_are_zeros(dataset: Path, channels: int) -> None:
    grids = np.random.default_rng(1).standard_normal((3, 6, channels)).astype(np.float16)
    color_map = fit_color_map(grids)
    assert color_map.components.shape == (channels, 3)
    colors = color_map.colors(grids[0])
    assert colors[:, :channels].any(axis=0).all()
    assert not colors[:, channels:].any()
    assert not color_map.explained_variance[channels:].any()
    assert color_map.explained_variance.sum() == pytest.approx(1)
    _, panel, _ = panels(draw(dataset, write_store(dataset / "features", grids, replace(SPEC, channels=channels))))
    assert np.array_equal(cell_colors(panel).reshape(6, 3), colors)


def test_rounding_errors_are_not_shown_as_colors() -> None:
    collinear = (grids_with_one_odd_region().astype(np.float64) * 0.1).astype(np.float16)
    assert not fit_color_map(collinear).colors(collinear[0])[:, 1:].any()
    nearly_constant = np.ones((50, 6, 3), dtype=np.float16) / 3
    nearly_constant[0, 0] = 7
    assert not fit_color_map(nearly_constant).colors(nearly_constant[1]).any()


@pytest.mark.slow
def test_a_constant_store_is_plotted(dataset: Path) -> None:
    store = write_store(dataset / "features", np.full((3, 6, 4), 0.1, dtype=np.float16))
    title = draw_grid(FeatureStore(store), 1, dataset / "prepared", dataset / "images", dataset / "grid.png")
    assert "0.0%, 0.0%, 0.0%" in title
    assert not cell_colors(panels(dataset / "grid.png")[1]).any()


@pytest.mark.slow
def test_images_are_sampled_evenly_from_a_large_store(dataset: Path) -> None:
    num_images = 3 * MAX_SAMPLED_IMAGES
    spec = replace(SPEC, grid_height=1, grid_width=1)
    grids = np.zeros((num_images, 1, 4), dtype=np.float16)
    # A sample of one end, or of every second image, would explain other fractions of the variance.
    grids[::2, 0, 0] = 1
    grids[num_images // 2 :, 0, 1] = 8
    store = write_store(dataset / "features", grids, spec)
    title = draw_grid(FeatureStore(store), 1, dataset / "prepared", dataset / "images", dataset / "grid.png")
    first, second, _ = fit_color_map(grids).explained_variance
    assert f"{first:.1%}, {second:.1%}, 0.0% ({MAX_SAMPLED_IMAGES} images)" in title


@pytest.mark.slow
def test_inspect_writes_the_plot_and_prints_its_title(dataset: Path) -> None:
    write_store(dataset / "features", grids_with_one_odd_region())
    result = inspect(dataset, "--image", "2", "--out", str(dataset / "new/grid.png"))
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{dataset}/new/grid.png: image 2: 2.png")
    for fact in ("resnet18", "layer3", "2 x 3 regions", "4 channels", "100.0%, 0.0%, 0.0%", "3 images"):
        assert fact in result.output
    assert len(panels(dataset / "new/grid.png")) == 3


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--image", "1"), ["--image", "--out"]),
        (("--out", "grid.png"), ["--image", "--out"]),
        (("--image", "1", "--out", "grid.jpg"), ["grid.jpg", ".png"]),
        (("--image", "4", "--out", "grid.png"), ["{dataset}/prepared/records.jsonl: ", "no image 4", "such as 1"]),
        (("--image", "9", "--out", "grid.png"), ["{dataset}/features/index.json: ", "no image 9"]),
        (("--image", "3", "--out", "grid.png"), ["{dataset}/images/3.png: ", "No such file"]),
        (("--image", "1", "--out", "{dataset}/params.yaml/grid.png"), ["{dataset}/params.yaml/grid.png: ", "--out"]),
    ],
)
def test_inspect_reports_why_it_cannot_plot(dataset: Path, arguments: tuple[str, ...], facts: list[str]) -> None:
    write_store(dataset / "features", grids_with_one_odd_region())
    (dataset / "images/3.png").unlink()
    error = inspect(dataset, *(argument.format(dataset=dataset) for argument in arguments)).exception
    assert isinstance(error, UserError)
    assert all(fact.format(dataset=dataset) in str(error) for fact in facts)


def test_a_changed_image_file_is_an_error_that_names_both_digests(dataset: Path) -> None:
    store = write_store(dataset / "features", grids_with_one_odd_region())
    path = dataset / "images/2.png"
    path.write_bytes(image_file(1))
    encoded, actual = (sha256(image_file(image_id)).hexdigest() for image_id in (2, 1))
    with pytest.raises(UserError) as error:
        draw(dataset, store, image_id=2)
    assert str(error.value).startswith(f"{path}: ")
    assert all(fact in str(error.value) for fact in (actual, encoded, "image 2"))
    assert not (dataset / "grid.png").exists()


def test_a_folder_without_a_store_is_an_error(dataset: Path) -> None:
    error = inspect(dataset, "--image", "1", "--out", str(dataset / "grid.png")).exception
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{dataset}/features: ")


def test_a_grid_that_is_not_finite_is_an_error(dataset: Path) -> None:
    grids = grids_with_one_odd_region()
    grids[2, 0, 0] = np.inf
    store = write_store(dataset / "features", grids)
    with pytest.raises(UserError, match=r"shard-\w+\.h5: image 3: .*NaN"):
        draw(dataset, store)


@pytest.mark.slow
def test_a_long_file_name_fits_and_is_not_parsed_as_math(dataset: Path) -> None:
    name = r"$\frac$" * 20 + ".png"
    (dataset / "images" / name).write_bytes(image_file(1))
    write_records(dataset / "prepared", [Record(image_id=1, file=name, split="train", captions=("A cube .",))])
    with Image.open(draw(dataset, write_store(dataset / "features", grids_with_one_odd_region()))) as image:
        title = np.asarray(image.convert("L"))[:30]
    left, right = (title < 255).any(axis=0).nonzero()[0][[0, -1]]
    assert 20 < left < right < title.shape[1] - 20
