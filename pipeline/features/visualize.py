"""Plots of an image's grid: its principal components as colors, and the norms of its regions.

The same store and image file give the same bytes. pyplot, whose state is global, is not used.

Shapes: B images, P = H * W regions of a grid in row-major order, C channels.
"""

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipeline.artifacts import write_atomically
from pipeline.captions.records import RECORDS_FILE, Record, read_records
from pipeline.errors import UserError, write_error
from pipeline.features.images import Pixels, read_image_file, read_views
from pipeline.features.store import FeatureStore, Grids
from pipeline.features.views import View

MAX_SAMPLED_IMAGES = 200
"""Maximum number of images that the components are fitted to."""

_WIDTH, _HEIGHT = 11.0, 4.2  # inches
_NUM_COMPONENTS = 3
# All regions at once would take gigabytes in float64; one grid at a time would be slow.
_REGIONS_PER_BLOCK = 1024
# Variances and ranges below this fraction of the largest are rounding errors.
_EPSILON = 1e-6

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ColorMap:
    """Three principal components of region features, shown as red, green and blue."""

    mean: _Floats
    """Mean of the sampled regions, [C]."""
    components: _Floats
    """Unit vectors, [C, 3], by descending variance, with the largest loading positive. Absent components are 0."""
    explained_variance: _Floats
    """Fraction of the sample's variance that each component explains, [3]."""
    low: _Floats
    """Value of each component that maps to 0, [3]."""
    high: _Floats
    """Value of each component that maps to 255, [3]."""

    def colors(self, grid: Grids) -> Pixels:
        """Map regions, float16 [P, C], to colors, uint8 RGB [P, 3]."""
        intensity = (_project(grid, self.mean, self.components) - self.low) / (self.high - self.low)  # [P, 3]
        pixels: Pixels = (255 * intensity.clip(0, 1)).round().astype(np.uint8)
        return pixels


def fit_color_map(grids: Grids) -> ColorMap:
    """Fit principal components to all regions of finite grids, float16 [B, P, C].

    The colors of a component range from its 1st to its 99th percentile.
    """
    channels = grids.shape[-1]
    regions = grids.reshape(-1, channels)  # [B * P, C]
    blocks = np.split(regions, range(_REGIONS_PER_BLOCK, len(regions), _REGIONS_PER_BLOCK))
    mean = regions.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((channels, channels))
    for block in blocks:
        centered = block.astype(np.float64) - mean
        covariance += centered.T @ centered
    covariance /= len(regions)
    variances, components = _principal_components(covariance)
    projections = np.concatenate([_project(block, mean, components) for block in blocks])  # [B * P, 3]
    low, high = np.percentile(projections, (1, 99), axis=0)
    # The percentiles of nearly constant values coincide. Without a minimum range, rounding errors would show as colors.
    min_range = _EPSILON * np.abs(projections).max(axis=0) + np.finfo(np.float32).tiny
    return ColorMap(
        mean=mean,
        components=components,
        explained_variance=variances / max(np.trace(covariance), np.finfo(np.float64).tiny),
        low=low,
        high=np.maximum(high, low + min_range),
    )


def draw_grid(store: FeatureStore, image_id: int, prepared: Path, image_dir: Path, out: Path) -> str:
    """Plot the first view of an image, its grid as colors, and the norms of its regions.

    The color map is fitted to at most `MAX_SAMPLED_IMAGES` images of the store, evenly spaced.

    Args:
        store: The feature store.
        image_id: The image.
        prepared: Folder of the records, which name the image's file.
        image_dir: Folder that the records' files are relative to.
        out: PNG file to write.

    Returns:
        The title of the plot.

    Raises:
        UserError: `out` is not a PNG file or cannot be written, the records or the store lack the image, the image file
            or a shard cannot be read, or the image file has changed since it was encoded.
    """
    if out.suffix != ".png":
        raise UserError(f"{out}: not a PNG file name. Choose an --out that ends in .png.")
    record = _find_record(prepared, image_id)
    grid = store.grid(image_id)
    sample_ids = _sample(store.image_ids)
    grids = store.grids(sample_ids)
    for grid_id, values in zip((image_id, *sample_ids), (grid, *grids), strict=True):
        if not np.isfinite(values).all():
            path = store.shard_path(grid_id)
            raise UserError(f"{path}: image {grid_id}: has NaN or infinite values. Run `dvc repro -f -s encode`.")
    view = store.views[0]
    path = image_dir / record.file
    content = _read_encoded_file(path, store, image_id)
    image = read_views(content, store.spec.frame, (view,), str(path))[0]  # [Y, X, 3]
    color_map = fit_color_map(grids)
    title = _title(store, record, len(sample_ids), color_map)
    _plot(image, view, grid, store.spec.grid, color_map, title, out)
    return title


def _principal_components(covariance: _Floats) -> tuple[_Floats, _Floats]:
    """Return variances [3] and components [C, 3] of a covariance matrix [C, C]."""
    channels = len(covariance)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)  # ascending
    num_present = min(_NUM_COMPONENTS, channels)
    variances, components = np.zeros(_NUM_COMPONENTS), np.zeros((channels, _NUM_COMPONENTS))
    variances[:num_present] = eigenvalues[::-1][:num_present]
    components[:, :num_present] = eigenvectors[:, ::-1][:, :num_present]
    negligible = variances <= _EPSILON * variances[0]
    variances[negligible], components[:, negligible] = 0, 0
    # The sign of an eigenvector is arbitrary.
    largest_loadings = components[np.abs(components).argmax(axis=0), np.arange(_NUM_COMPONENTS)]
    components *= np.where(largest_loadings < 0, -1, 1)
    return variances, components


def _find_record(prepared: Path, image_id: int) -> Record:
    records = read_records(prepared)
    for record in records:
        if record.image_id == image_id:
            return record
    example = f", such as {records[0].image_id}" if records else ""
    raise UserError(f"{prepared / RECORDS_FILE}: has no image {image_id}. Choose an image id from this file{example}.")


def _read_encoded_file(path: Path, store: FeatureStore, image_id: int) -> bytes:
    """Read an image file and check that it is the encoded file."""
    content = read_image_file(path)
    actual, encoded = sha256(content).hexdigest(), store.image_digest(image_id)
    if actual != encoded:
        raise UserError(
            f"{path}: has SHA-256 {actual}, but image {image_id} was encoded from a file with SHA-256 {encoded}."
            " Run `dvc repro encode`."
        )
    return content


def _sample(image_ids: tuple[int, ...]) -> list[int]:
    """Choose at most `MAX_SAMPLED_IMAGES` ids, evenly spaced."""
    indices = np.linspace(0, len(image_ids) - 1, min(len(image_ids), MAX_SAMPLED_IMAGES)).round()
    return [image_ids[int(index)] for index in indices]


def _project(regions: Grids, mean: _Floats, components: _Floats) -> _Floats:
    """Project regions, float16 [P, C], onto components: [P, 3]."""
    projections: _Floats = (regions.astype(np.float64) - mean) @ components
    return projections


def _title(store: FeatureStore, record: Record, num_sampled: int, color_map: ColorMap) -> str:
    spec = store.spec
    explained = ", ".join(f"{fraction:.1%}" for fraction in color_map.explained_variance)
    return (
        f"image {record.image_id}: {record.file}\n"
        f"{spec.architecture}, {spec.layer}: {spec.grid_height} x {spec.grid_width} regions,"
        f" {spec.channels} channels; variance explained by 3 components: {explained} ({num_sampled} images)"
    )


def _plot(
    image: Pixels,
    view: View,
    grid: Grids,
    grid_size: tuple[int, int],
    color_map: ColorMap,
    title: str,
    out: Path,
) -> None:
    norms = np.linalg.norm(grid.astype(np.float64), axis=1)  # [P]
    # The user's matplotlib settings would change the bytes.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        # A character is about 0.6 of the font size wide, and a point is 1/72 inch.
        font_size = min(11.0, 72 * _WIDTH / (0.6 * max(map(len, title.splitlines()))))
        figure.suptitle(title, fontsize=font_size, parse_math=False)
        panels = (
            (f"view {view}, {image.shape[0]} x {image.shape[1]} px", image),
            ("PCA components 1, 2, 3 as RGB", color_map.colors(grid).reshape(*grid_size, _NUM_COMPONENTS)),
            ("L2 norm of each region", norms.reshape(grid_size)),
        )
        for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            # The grid fills the image, even if its cells are not square.
            mappable = axes.imshow(values, interpolation="nearest", aspect="auto")
            axes.set_box_aspect(image.shape[0] / image.shape[1])
            axes.set_axis_off()
            axes.set_title(name, fontsize=10)
        figure.colorbar(mappable, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise write_error(error, out, "Choose another --out.") from error
