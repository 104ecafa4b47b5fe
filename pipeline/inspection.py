"""`gridcap inspect`: describe HDF5 artifacts and JSON indices as text, and verify feature stores.

Legend: `N` rows of a dataset, `P` regions of a grid, `C` channels.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import read_json
from pipeline.captions import tokens
from pipeline.captions.vocabulary import VOCABULARY_FILE, Vocabulary, read_vocabulary
from pipeline.errors import UserError, printable
from pipeline.features import store
from pipeline.hdf5 import checked_dataset, open_artifact, read_dataset

_REMEDY = "Restore it with `dvc checkout`, or run its stage again."
_HDF5_SUFFIXES = (".h5", ".hdf5")
_SAMPLE_SIZE = 5  # rows or values printed per dataset
# Statistics read at most this many values of a dataset: a file of any size can be inspected.
_MAX_VALUES = 2**22
_MAX_ROW_VALUES = 2**27
_SHADES = " .:-=+*#%@"
# Baseline of the size comparison: the feature grids of Xu et al. 2015, in PyTorch's default dtype.
_BASELINE_SIDE, _BASELINE_DTYPE = 14, np.dtype(np.float32)


def describe(path: Path) -> Iterator[str]:
    """Describe an HDF5 file, or all HDF5 files and JSON indices below a folder.

    Of several files with the same schema in one folder, the first is described in full and the rest in one line each.

    Yields:
        Lines to print.

    Raises:
        UserError: A file is missing, damaged, or not written by gridcap.
    """
    if path.is_file():
        yield from _describe_file(path)
    elif path.is_dir():
        yield from _describe_folder(path)
    else:
        raise UserError(f"{path}: no such file or folder. Name an artifact, such as data/tokens or data/features.")


def open_store(folder: Path) -> store.FeatureStore:
    """Open the feature store in a folder.

    Raises:
        UserError: The folder has no index, or the index is not valid.
    """
    if not (folder / store.INDEX_FILE).is_file():
        raise UserError(
            f"{folder}: not a feature store, since it has no {store.INDEX_FILE}."
            " Name the folder of one, such as data/features."
        )
    return store.FeatureStore(folder)


def verify(folder: Path) -> str:
    """Compare the SHA-256 of every shard of a feature store with its index.

    Returns:
        The result as a line to print.

    Raises:
        UserError: The folder is not a feature store, or a shard is missing or altered.
    """
    num_shards = open_store(folder).verify()
    return f"{folder}: all shards match {store.INDEX_FILE} ({num_shards:,})"


def _describe_folder(folder: Path) -> Iterator[str]:
    # Hidden folders contain unfinished work, including hard links of published shards.
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    artifacts = [file for file in files if file.suffix in _HDF5_SUFFIXES]
    indices = [file for file in files if file.suffix == ".json" and _is_index(file)]
    if not artifacts and not indices:
        raise UserError(f"{folder}: contains no HDF5 file and no JSON index. Run `dvc repro`, or name another folder.")
    for index in indices:
        yield from _describe_index(index)
        yield ""
    for (parent, schema), group in groupby(artifacts, key=lambda file: (file.parent, _schema_name(file))):
        first, *remaining = group
        yield from _describe_file(first)
        yield ""
        sizes = [(_num_rows(first), first.stat().st_size)]
        for file in remaining:
            num_rows, size = _num_rows(file), file.stat().st_size
            yield f"{file}: {schema}, {num_rows:,} rows, {size:,} bytes"
            sizes.append((num_rows, size))
        is_store = schema == store.SCHEMA.name
        if remaining or is_store:
            yield _total_size(parent, sizes) + (_size_per_image(first) if is_store else "")
            yield ""


def _total_size(folder: Path, sizes: Sequence[tuple[int, int]]) -> str:
    """Sum the rows and bytes of files, given as pairs."""
    num_rows, size = (sum(values) for values in zip(*sizes, strict=True))
    per_row = f", {size / num_rows:,.0f} bytes per row" if num_rows else ""
    return f"{folder}: {len(sizes):,} files, {num_rows:,} rows, {size:,} bytes{per_row}"


def _size_per_image(shard: Path) -> str:
    """Compare the size of an image's grids with the baseline; empty without an index, which lists the views."""
    index = shard.with_name(store.INDEX_FILE)
    views = _read_index(index).get("views") if index.is_file() else None
    num_views = len(views) if isinstance(views, list) else 0
    if not num_views:
        return ""
    with _open(shard) as file:
        num_regions, channels = file["grid"].shape[1:]
        size = num_views * num_regions * channels * file["grid"].dtype.itemsize
    baseline = num_views * _BASELINE_SIDE**2 * channels * _BASELINE_DTYPE.itemsize
    return (
        f"; {size:,} bytes per image (as {_BASELINE_SIDE} x {_BASELINE_SIDE} x {channels} {_BASELINE_DTYPE} grids:"
        f" {baseline:,} bytes, {baseline / size:.1f}x)"
    )


def _describe_file(path: Path) -> Iterator[str]:
    with _open(path) as file:
        attributes = dict(file.attrs)
        schema = str(attributes.pop("schema"))
        yield f"{path}: {schema}, version {attributes.pop('schema_version', 'unknown')}"
        yield f"  fingerprint {attributes.pop('fingerprint', 'unknown')}, {path.stat().st_size:,} bytes"
        for name, value in sorted(attributes.items()):
            yield f"  {name}: {format_value(value)}"
        datasets = _datasets(file)
        yield from _dataset_table(datasets)
        if schema == tokens.SCHEMA.name:
            vocabulary_path = path.with_name(VOCABULARY_FILE)
            vocabulary = read_vocabulary(vocabulary_path) if vocabulary_path.is_file() else None
            yield from _describe_tokens(file, vocabulary)
        elif schema == store.SCHEMA.name:
            yield from _describe_grid(file)
        else:
            yield from _describe_values(datasets)


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open any HDF5 file that gridcap wrote, whatever its schema version."""
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: not an HDF5 file. Name an HDF5 file, or a folder with HDF5 files.")
    with open_artifact(path, None, _REMEDY) as file:
        if not isinstance(file.attrs.get("schema"), str):
            raise UserError(f"{path}: has no attribute 'schema', so gridcap did not write it. Use h5dump.")
        yield file


def _schema_name(path: Path) -> str:
    with _open(path) as file:
        return str(file.attrs["schema"])


def _num_rows(path: Path) -> int:
    """Length of the longest dataset."""
    with _open(path) as file:
        return max((len(dataset) for dataset in _datasets(file).values() if dataset.shape), default=0)


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    datasets: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            datasets[name] = item

    file.visititems(visit)
    return datasets


def _dataset_table(datasets: dict[str, h5py.Dataset]) -> Iterator[str]:
    header = ("dataset", "shape", "dtype", "chunks", "bytes", "description")
    rows = [
        (
            name,
            _format_shape(dataset.shape),
            "string" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype),
            _format_shape(dataset.chunks),
            f"{dataset.id.get_storage_size():,}",
            format_value(dataset.attrs.get("description", "-")),
        )
        for name, dataset in datasets.items()
    ]
    # The descriptions in the last column are long, so it is not padded.
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header) - 1)] + [0]
    yield ""
    for row in [header, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _describe_tokens(file: h5py.File, vocabulary: Vocabulary | None) -> Iterator[str]:
    for split, group in file.items():
        image_ids = read_dataset(group, "image_id", np.int64, [None])
        num_ids = checked_dataset(group, "ids", np.int32, [None]).size
        offset = read_dataset(group, "offset", np.int64, [len(image_ids) + 1])
        num_images = len(np.unique(image_ids))
        mean_length = f", {num_ids / len(image_ids):.1f} ids per caption" if len(image_ids) else ""
        yield ""
        images = "without images" if split == "text" else f"of {num_images:,} images"
        yield f"  {split}: {len(image_ids):,} captions {images}{mean_length}"
        for row in range(min(_SAMPLE_SIZE, len(image_ids))):
            ids = group["ids"][offset[row] : offset[row + 1]].tolist()
            words = vocabulary.decode(ids) if vocabulary else map(str, ids)
            owner = "caption" if split == "text" else "image"
            yield f"    {owner} {image_ids[row]}: {format_value(' '.join(words), max_length=1000)}"


def _describe_grid(file: h5py.File) -> Iterator[str]:
    """Summarize the first grid of a shard and draw the norms of its regions."""
    if not len(file["grid"]):
        return
    grid = _read_first_rows(file["grid"])[0].astype(np.float32)  # [P, C]
    height, width = int(file.attrs["grid_height"]), int(file.attrs["grid_width"])
    norms = np.linalg.norm(grid, axis=1).reshape(height, width)
    yield ""
    yield f"  grid of image {file['image_id'][0]}: {_statistics(grid)}"
    yield f"  L2 norm of each region, {height} x {width}, from {norms.min():.4g} (blank) to {norms.max():.4g} (@):"
    with np.errstate(invalid="ignore"):
        scaled = (norms - norms.min()) / max(float(np.ptp(norms)), np.finfo(np.float32).tiny)  # in 0..1
    for row in scaled:
        # Two characters per region, since a character is about twice as high as it is wide.
        shades = (_SHADES[round(float(value) * (len(_SHADES) - 1))] if np.isfinite(value) else "?" for value in row)
        yield "    |" + "".join(shade * 2 for shade in shades) + "|"


def _describe_values(datasets: dict[str, h5py.Dataset]) -> Iterator[str]:
    """Summarize the values of each dataset."""
    yield ""
    for name, dataset in datasets.items():
        if not dataset.size:
            yield f"  {name}: empty"
            continue
        values = _read_first_rows(dataset)
        if values.dtype.kind in "iufb":
            scope = "" if values.size == dataset.size else f" (of the first {len(values):,} rows)"
            yield f"  {name}: {_statistics(values)}{scope}"
        if values.ndim < 2:
            yield f"  {name}: {', '.join(format_value(value) for value in values.ravel()[:_SAMPLE_SIZE])}"


def _read_first_rows(dataset: h5py.Dataset) -> NDArray[Any]:
    """Read as many rows as `_MAX_VALUES` allows, but at least one.

    Raises:
        ValueError: A row has more values than that of any grid.
    """
    if not dataset.shape:
        return np.asarray(dataset[()])
    if dataset.size // len(dataset) > _MAX_ROW_VALUES:
        raise ValueError(f"dataset {dataset.name} has more than {_MAX_ROW_VALUES:,} values per row")
    num_rows = max(1, _MAX_VALUES * len(dataset) // dataset.size)
    return np.asarray(dataset[:num_rows])


def _statistics(values: NDArray[Any]) -> str:
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return "no finite values"
    non_finite = f", {values.size - finite.size:,} not finite" if finite.size < values.size else ""
    return (
        f"min {finite.min():.4g}, mean {finite.mean():.4g}, max {finite.max():.4g}, "
        f"standard deviation {finite.std():.4g}, zeros {np.mean(finite == 0):.1%}{non_finite}"
    )


def _is_index(path: Path) -> bool:
    """Whether a JSON file starts with a schema, as gridcap's indices do. Caption files can be too large to parse."""
    with path.open("rb") as file:
        return b"".join(file.read(64).split()).startswith(b'{"schema":')


def _describe_index(path: Path) -> Iterator[str]:
    document = _read_index(path)
    yield f"{path}: {format_value(document.pop('schema'))}, version {document.pop('schema_version', 'unknown')}"
    for name, value in document.items():
        if isinstance(value, dict | list):
            yield f"  {name}: {len(value):,} entries: {format_value(json.dumps(value, ensure_ascii=False))}"
        else:
            yield f"  {name}: {format_value(value)}"


def _read_index(path: Path) -> dict[str, Any]:
    return read_json(path, dict[str, Any], _REMEDY)


def format_value(value: object, max_length: int = 120) -> str:
    """Format a value as one line of printable text, truncated to `max_length` characters."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = printable(text)
    return text if len(text) <= max_length else text[: max_length - 3] + "..."


def _format_shape(shape: Iterable[int] | None) -> str:
    return " x ".join(map(str, shape)) or "scalar" if shape is not None else "-"
