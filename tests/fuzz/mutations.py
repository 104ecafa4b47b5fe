"""Seeded damage to files: to any bytes, and to JSON, YAML, HDF5 and safetensors by their structure."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

from pipeline.params import read_yaml

Mutator = Callable[[Path, Random], None]

_FRAGMENTS = [b"\0", b"\n", b"\r", b'"', b"{", b"\xff", b"\xed\xa0\x80", "\u2028".encode(), b"-", b"\xef\xbb\xbf"]
_VALUES: list[Any] = [None, True, -1, 0, 2**31, 2**63, 10**400, -0.5, float("nan"), float("inf"), 1e308]
_VALUES += ["", "x", "../x", "a\0b", "\ud800", [], {}, [[]], json.loads("[" * 100 + "]" * 100)]
_DOCUMENTS = (".json", ".jsonl", ".gz", ".yaml", ".safetensors")
_NUMBERS = [-1, 0, 1, 127, 2**31 - 1, 2**63 - 1, float("nan"), float("inf"), -1e308]


def damage(path: Path, rng: Random) -> str:
    """Damage a file, half of the time by its structure if it has one, and return the name of the mutator."""
    structured = {".h5": _HDF5_MUTATORS} | dict.fromkeys(_DOCUMENTS, _DOCUMENT_MUTATORS)
    named = rng.choice([_FILE_MUTATORS, structured.get(path.suffix, _FILE_MUTATORS)])
    name = rng.choice(sorted(named))
    named[name](path, rng)
    return name


def _of_bytes(change: Callable[[bytes, Random], bytes]) -> Mutator:
    def mutate(path: Path, rng: Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return mutate


def _span(content: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randrange(len(content))
    return start, min(len(content), start + rng.choice([1, 4, 16, 256, 4096]))


def _flip(content: bytes, rng: Random) -> bytes:
    start, _ = _span(content, rng)
    return content[:start] + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :]


def _overwrite(content: bytes, rng: Random) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + rng.randbytes(end - start) + content[end:]


def _duplicate(content: bytes, rng: Random) -> bytes:
    start, end = _span(content, rng)
    return content[:end] + content[start:]


def _swap(content: bytes, rng: Random) -> bytes:
    (a, b), (c, d) = sorted([_span(content, rng), _span(content, rng)])
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _insert(content: bytes, rng: Random) -> bytes:
    start, _ = _span(content, rng)
    return content[:start] + rng.choice(_FRAGMENTS) + content[start:]


def _delete(path: Path, rng: Random) -> None:
    path.unlink()


def _make_folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


_FILE_MUTATORS: dict[str, Mutator] = {
    "flip a bit": _of_bytes(_flip),
    "overwrite": _of_bytes(_overwrite),
    "cut": _of_bytes(lambda content, rng: content[: rng.randrange(len(content))]),
    "append": _of_bytes(lambda content, rng: content + rng.randbytes(rng.choice([1, 100]))),
    "duplicate a chunk": _of_bytes(_duplicate),
    "swap chunks": _of_bytes(_swap),
    "insert": _of_bytes(_insert),
    "empty": _of_bytes(lambda content, rng: b""),
    "random bytes": _of_bytes(lambda content, rng: rng.randbytes(len(content))),
    "delete": _delete,
    "make a folder": _make_folder,
}


def _of_document(change: Callable[[Any, Random], str]) -> Mutator:
    """Make a mutator of JSON, of a line of JSON, of YAML and of the header of a safetensors file."""

    def mutate(path: Path, rng: Random) -> None:
        if path.suffix == ".yaml":
            path.write_text(change(read_yaml(path), rng))  # JSON is YAML
        elif path.suffix == ".safetensors":
            content = path.read_bytes()
            end = 8 + int.from_bytes(content[:8], "little")
            header = change(json.loads(content[8:end]), rng).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            index = rng.randrange(len(lines))
            lines[index] = change(json.loads(lines[index]), rng)
            path.write_text("\n".join(lines) + "\n")
        else:
            decompress, compress = (gzip.decompress, gzip.compress) if path.suffix == ".gz" else (bytes, bytes)
            path.write_bytes(compress(change(json.loads(decompress(path.read_bytes())), rng).encode()))

    return mutate


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """List all containers below a value, each with each of its keys."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [entry for key in keys for entry in _entries(value[key])]


def _replace_value(document: Any, rng: Random) -> str:
    container, key = rng.choice(_entries(document))
    container[key] = rng.choice(_VALUES)
    return json.dumps(document)


def _drop_entry(document: Any, rng: Random) -> str:
    container, key = rng.choice(_entries(document))
    del container[key]
    return json.dumps(document)


def _repeat_entry(document: Any, rng: Random) -> str:
    """Repeat an item of a list, or a key of an object with another value."""
    container, key = rng.choice(_entries(document))
    if isinstance(container, list):
        container.append(container[key])
        return json.dumps(document)
    return json.dumps(document).replace(f"{json.dumps(key)}: ", f'{json.dumps(key)}: "x", {json.dumps(key)}: ', 1)


def _add_key(document: Any, rng: Random) -> str:
    text = json.dumps(document)
    start = rng.choice([match.end() for match in re.finditer(r"{(?!})", text)] or [0])
    return f'{text[:start]}"unknown": {json.dumps(rng.choice(_VALUES))}, {text[start:]}'


_DOCUMENT_MUTATORS: dict[str, Mutator] = {
    "replace a value": _of_document(_replace_value),
    "drop an entry": _of_document(_drop_entry),
    "repeat an entry": _of_document(_repeat_entry),
    "add a key": _of_document(_add_key),
}


def _of_hdf5(change: Callable[[h5py.File, str, Random], None]) -> Mutator:
    def mutate(path: Path, rng: Random) -> None:
        with h5py.File(path, "r+") as file:
            datasets: list[str] = []
            file.visititems(lambda name, item: datasets.append(name) if isinstance(item, h5py.Dataset) else None)
            change(file, rng.choice(datasets), rng)

    return mutate


def _change_value(file: h5py.File, name: str, rng: Random) -> None:
    values = file[name][...]
    if not values.size:
        return
    index = tuple(rng.randrange(size) for size in values.shape)
    number = rng.choice(_NUMBERS)
    if values.dtype.kind in "iu":
        limits = np.iinfo(values.dtype)
        number = min(max(int(np.nan_to_num(number)), limits.min), limits.max)
    with np.errstate(over="ignore"):
        values[index] = number if values.dtype.kind in "iuf" else b"x"
    file[name][...] = values


def _change_shape(file: h5py.File, name: str, rng: Random) -> None:
    values = file[name][...]
    del file[name]
    file[name] = rng.choice([values[:-1], values[:0], values[None], np.repeat(values, 2, axis=0), np.float32(1)])


def _change_dtype(file: h5py.File, name: str, rng: Random) -> None:
    shape = file[name].shape
    del file[name]
    file[name] = np.ones(shape, rng.choice(["f8", "i1", "u8", "S3", "?", "c8"]))


def _change_attribute(file: h5py.File, name: str, rng: Random) -> None:
    attribute = rng.choice(sorted(file.attrs))
    if rng.random() < 0.3:
        del file.attrs[attribute]
    else:
        file.attrs[attribute] = rng.choice([-1, 0, 2**40, 0.5, np.nan, "x", np.arange(3), h5py.Empty("f4")])


def _drop_dataset(file: h5py.File, name: str, rng: Random) -> None:
    del file[rng.choice([name, name.partition("/")[0]])]


_HDF5_MUTATORS: dict[str, Mutator] = {
    "change a value": _of_hdf5(_change_value),
    "change a shape": _of_hdf5(_change_shape),
    "change a dtype": _of_hdf5(_change_dtype),
    "change an attribute": _of_hdf5(_change_attribute),
    "drop a dataset": _of_hdf5(_drop_dataset),
}
