"""What `gridcap inspect` tells of HDF5 artifacts: attributes, datasets, a few rows, and whether shards are whole."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pipeline.captions import tokens
from pipeline.captions.vocabulary import Vocabulary, read_vocabulary
from pipeline.errors import UserError
from pipeline.features import store

_HDF5_SUFFIXES = (".h5", ".hdf5")
_ROWS_SHOWN = 5
# A shard of features is small, but any file may be inspected: statistics look at this many numbers at most.
_NUMBERS_READ = 2**22
_SHADES = " .:-=+*#%@"
# The grids of Xu et al. 2015, in PyTorch's own numbers: what features are compared with.
_USUAL_SIDE, _USUAL_TYPE = 14, np.float32


def describe(path: Path) -> Iterator[str]:
    """Describe an HDF5 file, or all HDF5 files and JSON indices below a folder, as lines to print.

    Of several files of one schema in one folder the first is told in full, the others in a line each. Raises
    `UserError`, naming the file, where it is missing, damaged or not of this pipeline.
    """
    if path.is_file():
        yield from _describe_file(path)
    elif path.is_dir():
        yield from _describe_folder(path)
    else:
        raise UserError(f"{path}: no such file or folder; name an artifact, such as data/tokens or data/features")


def open_store(folder: Path) -> store.FeatureStore:
    """Open the feature store in a folder.

    Raises `UserError` where the folder is none, and as `FeatureStore` does.
    """
    if not (folder / store.INDEX_FILE).is_file():
        raise UserError(
            f"{folder}: is no feature store (it has no {store.INDEX_FILE}); name the folder of one, such as"
            " data/features"
        )
    return store.FeatureStore(folder)


def verify(folder: Path) -> str:
    """Compare all shards of a feature store with its index; returns what was found as a line to print.

    Raises `UserError` where the folder is no feature store, and one that names each shard that is missing or altered.
    """
    compared = open_store(folder).verify()
    return f"{folder}: shards compared with {store.INDEX_FILE}: {compared:,}, all as they were written"


def _describe_folder(folder: Path) -> Iterator[str]:
    # Hidden folders hold unfinished work, some of it the very shards that are published elsewhere.
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    artifacts = [file for file in files if file.suffix in _HDF5_SUFFIXES]
    indices = [file for file in files if file.suffix == ".json" and _is_index(file)]
    if not artifacts and not indices:
        raise UserError(f"{folder}: holds no HDF5 file and no index; run `dvc repro` to make some")
    for index in indices:
        yield from _describe_index(index)
        yield ""
    for (place, schema), group in groupby(artifacts, key=lambda file: (file.parent, _schema(file))):
        first, *others = group
        yield from _describe_file(first)
        yield ""
        for other in others:
            yield f"{other}: {schema}, {_rows(other):,} rows, {other.stat().st_size:,} bytes"
        if others or schema == store.SCHEMA.name:
            each = _size_an_image(first) if schema == store.SCHEMA.name else ""
            yield _total(place, [first, *others]) + each
            yield ""


def _total(folder: Path, files: Sequence[Path]) -> str:
    rows = sum(_rows(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    each = f", {size / rows:,.0f} bytes a row" if rows else ""
    return f"{folder}: {len(files):,} files, {rows:,} rows, {size:,} bytes{each}"


def _size_an_image(shard: Path) -> str:
    """What a shard's grids take an image, beside what is usual; nothing where no index says of how many views."""
    index = shard.with_name(store.INDEX_FILE)
    views = len(_read_json(index).get("views", ())) if index.is_file() else 0
    if not views:
        return ""
    with _opened(shard) as file:
        regions, channels = file["grid"].shape[1:]
        size = views * regions * channels * file["grid"].dtype.itemsize
    usual = views * _USUAL_SIDE**2 * channels * np.dtype(_USUAL_TYPE).itemsize
    return (
        f"; {size:,} bytes an image; {_USUAL_SIDE} x {_USUAL_SIDE} grids of the same channels in"
        f" {np.dtype(_USUAL_TYPE)} would take {usual:,} bytes an image, {usual / size:.1f} times as much"
    )


def _describe_file(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        attributes = dict(file.attrs)
        schema = str(attributes.pop("schema"))
        yield f"{path}: {schema}, version {attributes.pop('schema_version', 'unknown')}"
        yield f"  fingerprint {attributes.pop('fingerprint', 'unknown')}, {path.stat().st_size:,} bytes"
        for name, value in sorted(attributes.items()):
            yield f"  {name}: {plain(value)}"
        datasets = _datasets(file)
        yield from _table(datasets)
        match schema:
            case tokens.SCHEMA.name:
                words = path.with_name(tokens.VOCABULARY_FILE)
                yield from _captions(file, read_vocabulary(words) if words.is_file() else None)
            case store.SCHEMA.name:
                yield from _grid(file)
            case _:
                yield from _statistics(datasets)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file of the pipeline; what h5py raises within, for damage, becomes a `UserError`."""
    if not h5py.is_hdf5(path):
        raise UserError(f"{path}: is no HDF5 file; name an HDF5 file or a folder with such files")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not isinstance(file.attrs.get("schema"), str):
                raise UserError(f"{path}: has no attribute 'schema': it is no file of gridcap; try h5dump")
            yield file
    # Data that was cut off shows only when it is read, and as any of these.
    except (OSError, LookupError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore it with `dvc checkout` or make it again") from error


def _schema(path: Path) -> str:
    with _opened(path) as file:
        return str(file.attrs["schema"])


def _rows(path: Path) -> int:
    """Length of the longest dataset."""
    with _opened(path) as file:
        return max((len(dataset) for dataset in _datasets(file).values() if dataset.shape), default=0)


def _datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(visit)
    return found


def _table(datasets: dict[str, h5py.Dataset]) -> Iterator[str]:
    head = ("dataset", "shape", "dtype", "chunks", "bytes", "description")
    rows = [
        (
            name,
            _by(dataset.shape),
            "string" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype),
            _by(dataset.chunks),
            f"{dataset.id.get_storage_size():,}",
            plain(dataset.attrs.get("description", "-")),
        )
        for name, dataset in datasets.items()
    ]
    # The last column is ragged: descriptions are long.
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head) - 1)] + [0]
    yield ""
    for row in [head, *rows]:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _captions(file: h5py.File, vocabulary: Vocabulary | None) -> Iterator[str]:
    for split, group in file.items():
        image_ids, lengths = group["image_id"], group["length"]
        images = len(np.unique(image_ids[:]))
        mean = f", {np.mean(lengths[:]):.1f} ids each" if len(lengths) else ""
        yield ""
        yield f"  {split}: {len(image_ids):,} captions of {images:,} images{mean}"
        for row in range(min(_ROWS_SHOWN, len(image_ids))):
            ids = group["tokens"][row, : lengths[row]].tolist()
            words = vocabulary.decode(ids) if vocabulary else map(str, ids)
            yield f"    image {image_ids[row]}: {plain(' '.join(words), limit=1000)}"


def _grid(file: h5py.File) -> Iterator[str]:
    if not len(file["grid"]):
        return
    grid = file["grid"][0].astype(np.float32)  # [P, C]
    height, width = int(file.attrs["grid_height"]), int(file.attrs["grid_width"])
    norms = np.linalg.norm(grid, axis=1).reshape(height, width)
    yield ""
    yield f"  grid of image {file['image_id'][0]}: {_summary(grid)}"
    yield f"  norm by region, {height} x {width}, from {norms.min():.4g} (blank) to {norms.max():.4g} (@):"
    with np.errstate(invalid="ignore"):
        shares = (norms - norms.min()) / max(float(np.ptp(norms)), np.finfo(np.float32).tiny)
    for row in shares:
        # Two characters a region: a character is about twice as high as it is wide.
        shades = (_SHADES[round(float(share) * (len(_SHADES) - 1))] if np.isfinite(share) else "?" for share in row)
        yield "    |" + "".join(shade * 2 for shade in shades) + "|"


def _statistics(datasets: dict[str, h5py.Dataset]) -> Iterator[str]:
    yield ""
    for name, dataset in datasets.items():
        if not dataset.size:
            yield f"  {name}: empty"
            continue
        values = _first(dataset)
        if values.dtype.kind in "iufb":
            read = "" if values.size == dataset.size else f" (of the first {len(values):,} rows)"
            yield f"  {name}: {_summary(values)}{read}"
        if values.ndim < 2:
            yield f"  {name}: {', '.join(plain(value) for value in values.ravel()[:_ROWS_SHOWN])}"


def _first(dataset: h5py.Dataset) -> NDArray[Any]:
    """As many rows as the limit allows, at least one."""
    if not dataset.shape:
        return np.asarray(dataset[()])
    rows = max(1, _NUMBERS_READ * len(dataset) // dataset.size)
    return np.asarray(dataset[:rows])


def _summary(values: NDArray[Any]) -> str:
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if not finite.size:
        return "no finite number"
    foreign = f", {numbers.size - finite.size:,} not finite" if finite.size < numbers.size else ""
    return (
        f"min {finite.min():.4g}, mean {finite.mean():.4g}, max {finite.max():.4g}, "
        f"standard deviation {finite.std():.4g}, zeros {np.mean(finite == 0):.1%}{foreign}"
    )


def _is_index(path: Path) -> bool:
    """Whether a JSON file opens with its schema, as the pipeline's own do; captions may be huge."""
    with path.open("rb") as file:
        return b"".join(file.read(64).split()).startswith(b'{"schema":')


def _describe_index(path: Path) -> Iterator[str]:
    document = _read_json(path)
    yield f"{path}: {plain(document.pop('schema'))}, version {document.pop('schema_version', 'unknown')}"
    for name, value in document.items():
        if isinstance(value, dict | list):
            yield f"  {name}: {len(value):,} entries: {plain(json.dumps(value, ensure_ascii=False))}"
        else:
            yield f"  {name}: {plain(value)}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error}); restore it with `dvc checkout`") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: wanted a JSON object, got {plain(document)}; restore it with `dvc checkout`")
    return document


def plain(value: object, limit: int = 120) -> str:
    """Put a value on one line, short, without characters that could steer a terminal."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _by(shape: Iterable[int] | None) -> str:
    return " x ".join(map(str, shape)) or "scalar" if shape is not None else "-"
