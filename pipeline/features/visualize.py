"""A grid beside its image: its principal components as colors, and its norms.

The same store and image file give the same bytes. Matplotlib is used without pyplot, as in evaluation.plots.

B images, P = H * W regions of a grid, by rows, C channels.
"""

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import cast

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from pipeline.artifacts import write_atomically
from pipeline.captions.records import RECORDS_FILE, Record, read_records
from pipeline.errors import UserError
from pipeline.features.images import Pixels, View, read_bytes, read_views
from pipeline.features.store import FeatureStore, Grids

SAMPLED_IMAGES = 200
"""Images, at most, whose regions the components are fitted to."""
WIDTH, HEIGHT = 11.0, 4.2
"""Of the picture, in inches."""

_CHANNELS = 3
# All at once would take gigabytes of float64, and one grid at a time is slow.
_REGIONS_A_BLOCK = 1024
# What is smaller beside the largest of its kind comes from rounding: of variances, and of ranges.
_NEGLIGIBLE = 1e-6

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ColorMap:
    """How a region's channels become red, green and blue: by three principal components, or fewer and zeros."""

    mean: _Floats
    """[C]."""
    components: _Floats
    """Unit vectors [C, 3] by falling variance, the loading largest in size positive; 0 for those there are not."""
    shares: _Floats
    """Shares [3] of the sample's variance."""
    low: _Floats
    """Values [3] of the components that show as 0."""
    high: _Floats
    """Values [3] that show as 255."""

    def colors(self, grid: Grids) -> Pixels:
        """Color regions, float16 [P, C], as uint8 RGB [P, 3]."""
        share = (_values(grid, self.mean, self.components) - self.low) / (self.high - self.low)
        pixels: Pixels = (255 * share.clip(0, 1)).round().astype(np.uint8)
        return pixels


def fit_color_map(grids: Grids) -> ColorMap:
    """Fit principal components, exactly, to all regions of grids, float16 [B, P, C], which must be finite.

    The 1st and the 99th percentile of a component's values become the ends of its color.
    """
    channels = grids.shape[-1]
    regions = grids.reshape(-1, channels)
    blocks = np.split(regions, range(_REGIONS_A_BLOCK, len(regions), _REGIONS_A_BLOCK))
    mean = regions.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((channels, channels))
    for block in blocks:
        centerd = block.astype(np.float64) - mean
        covariance += centerd.T @ centerd
    covariance /= len(regions)
    ascending, vectors = np.linalg.eigh(covariance)
    found = min(_CHANNELS, channels)
    variances, components = np.zeros(_CHANNELS), np.zeros((channels, _CHANNELS))
    variances[:found], components[:, :found] = ascending[::-1][:found], vectors[:, ::-1][:, :found]
    absent = variances <= _NEGLIGIBLE * variances[0]
    variances[absent], components[:, absent] = 0, 0
    loadings = components[np.abs(components).argmax(axis=0), np.arange(_CHANNELS)]
    components *= np.where(loadings < 0, -1, 1)
    values = np.concatenate([_values(block, mean, components) for block in blocks])
    low, high = np.percentile(values, (1, 99), axis=0)
    # Where nearly all regions are alike the percentiles meet; stretched over 0 to 255, rounding would show.
    narrowest = _NEGLIGIBLE * np.abs(values).max(axis=0) + np.finfo(np.float32).tiny
    return ColorMap(
        mean=mean,
        components=components,
        shares=variances / max(np.trace(covariance), np.finfo(np.float64).tiny),
        low=low,
        high=np.maximum(high, low + narrowest),
    )


def draw_grid(store: FeatureStore, image_id: int, prepared: Path, images: Path, out: Path) -> str:
    """Draw an image's first view as the encoder saw it, its grid in colors, and the norms of its regions.

    The colors are fitted to up to `SAMPLED_IMAGES` images of the store, evenly spaced by id. The image's file
    is the one that the records in `prepared` name, below the folder `images`. `out` is a PNG file. Returns the
    picture's title.

    Raises `UserError`, naming the file, where `out` does not end in .png or cannot be written, where the records
    or the store lack the image, where the image or a shard cannot be read, and where the image's file is not the one
    that was encoded.
    """
    if out.suffix != ".png":
        raise UserError(f"{out}: is no name for a PNG file; let --out end in .png")
    record = _record(prepared, image_id)
    grid = store.grid(image_id)
    sample = _evenly_spaced(store.image_ids)
    grids = store.grids(sample)
    for own, values in zip((image_id, *sample), (grid, *grids), strict=True):
        if not np.isfinite(values).all():
            raise UserError(f"the grid of image {own} holds numbers that are not finite; run `dvc repro -f -s encode`")
    # Only `encode` writes stores, of views that `read_views` makes.
    view = cast(View, store.views[0])
    path = images / record.file
    file = _encoded(path, store, image_id)
    picture = read_views(file, store.spec.image_size, (view,), str(path))[0]
    color_map = fit_color_map(grids)
    title = _title(store, record, len(sample), color_map)
    _draw(picture, view, grid, store.spec.grid, color_map, title, out)
    return title


def _record(prepared: Path, image_id: int) -> Record:
    records = read_records(prepared)
    for record in records:
        if record.image_id == image_id:
            return record
    known = f", such as {records[0].image_id}" if records else ""
    raise UserError(f"{prepared / RECORDS_FILE}: has no image {image_id}; name one that it has{known}")


def _encoded(path: Path, store: FeatureStore, image_id: int) -> bytes:
    """Read an image's file, which must be the one that its grid was made of."""
    file = read_bytes(path)
    found, encoded = sha256(file).hexdigest(), store.content(image_id)
    if found != encoded:
        raise UserError(
            f"{path}: has SHA-256 {found}, but the grid of image {image_id} is of a file with {encoded};"
            " run `dvc repro encode`"
        )
    return file


def _evenly_spaced(image_ids: tuple[int, ...]) -> list[int]:
    places = np.linspace(0, len(image_ids) - 1, min(len(image_ids), SAMPLED_IMAGES)).round()
    return [image_ids[int(place)] for place in places]


def _values(regions: Grids, mean: _Floats, components: _Floats) -> _Floats:
    """Values of the components for regions, float16 [N, C]: [N, 3]."""
    values: _Floats = (regions.astype(np.float64) - mean) @ components
    return values


def _title(store: FeatureStore, record: Record, sampled: int, color_map: ColorMap) -> str:
    spec = store.spec
    shares = ", ".join(f"{share:.1%}" for share in color_map.shares)
    return (
        f"image {record.image_id}: {record.file}\n"
        f"{spec.architecture}, {spec.layer}: {spec.grid_height} x {spec.grid_width} regions of"
        f" {spec.channels} channels; three components hold {shares} of the variance in {sampled} images"
    )


def _draw(
    picture: Pixels,
    view: View,
    grid: Grids,
    shape: tuple[int, int],
    color_map: ColorMap,
    title: str,
    out: Path,
) -> None:
    norms = np.linalg.norm(grid.astype(np.float64), axis=1)
    # The user's own matplotlib settings would make other bytes.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        # A letter is about 0.6 of the font size wide, and a point is 1/72 inch.
        size = min(11.0, 72 * WIDTH / (0.6 * max(map(len, title.splitlines()))))
        figure.suptitle(title, fontsize=size, parse_math=False)
        panels = (
            (f"view {view}, {len(picture)} x {len(picture)} px", picture),
            ("components 1, 2, 3 as red, green, blue", color_map.colors(grid).reshape(*shape, _CHANNELS)),
            ("norm by region", norms.reshape(shape)),
        )
        for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            # The grid covers all of the square, however many rows and columns it has.
            shown = axes.imshow(values, interpolation="nearest", aspect="auto")
            axes.set_box_aspect(1)
            axes.set_axis_off()
            axes.set_title(name, fontsize=10)
        figure.colorbar(shown, cax=axes.inset_axes((1.03, 0, 0.05, 1)))
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    try:
        write_atomically(out, content.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another file with --out") from error
