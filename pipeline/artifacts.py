"""Artifacts that are complete or absent: fingerprints, checked reads, atomic writes, work folders, publication.

A stage works in `data/.work/<stage>/<fingerprint>/`, which survives kills and is ignored by git and DVC, and publishes
its result under the final name once it is complete.
"""

import codecs
import ctypes
import errno
import fcntl
import gzip
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from tqdm import tqdm
from typing_extensions import TypedDict

from pipeline.errors import UserError, summarize
from pipeline.startup import defer_interrupts

T = TypeVar("T")

logger = logging.getLogger("gridcap")

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""An integer that NumPy and HDF5 can hold, such as an image id. JSON has integers of any size."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""

MAX_DECOMPRESSED_SIZE = 2**30
"""Bytes of the largest content that is read from a compressed file."""

_READ_SIZE = 2**16
_DIGESTS_PER_TASK = 16
_MAX_PENDING_TASKS = 256

_MEMBERS_PER_PART = 4000

_canonical_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"))  # an altered document may have NaN

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that have no file locks, such as some network file systems."""

# From linux/fs.h and linux/fcntl.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Schema(NamedTuple):
    """Name and version of an artifact's file format, as the artifact itself records them."""

    name: str
    version: int

    @property
    def header(self) -> dict[str, str | int]:
        """Keys of a JSON document, or attributes of an HDF5 file, that record this schema."""
        return {"schema": self.name, "schema_version": self.version}

    def check(self, path: Path, recorded: tuple[object, object], remedy: str) -> None:
        """Check that an artifact records this schema.

        Args:
            path: The artifact.
            recorded: Name and version that it records.
            remedy: What the user should do about another schema, as a sentence.

        Raises:
            UserError: The artifact records another name or version.
        """
        if recorded != self:
            raise UserError(
                f"{path}: has schema {recorded[0]} version {recorded[1]}, expected {self.name} version {self.version}."
                f" {remedy}"
            )


def fingerprint(**parts: Any) -> str:
    """Digest named JSON values into 16 hexadecimal digits that identify a run."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    # The buffer of hashlib.file_digest takes longer to allocate than a small image to hash.
    with open(path, "rb", buffering=0) as file:
        while content := file.read(_READ_SIZE):
            digest.update(content)
    return digest.hexdigest()


def file_digests(
    paths: Sequence[Path | str], desc: str, unit: str, num_threads: int | None = None, silent: bool = False
) -> list[str | OSError]:
    """Compute the SHA-256 of many files on several threads.

    Args:
        paths: The files; many paths take less memory as strings.
        desc: Label of the progress bar, which is shown on a terminal only.
        unit: Unit of the progress bar.
        num_threads: Number of threads; None uses the default of `ThreadPoolExecutor`.
        silent: Whether to hide the progress bar.

    Returns:
        For each file, its digest in hexadecimal, or the error if it cannot be read.
    """

    def digest(path: Path | str) -> str | OSError:
        try:
            return file_digest(path)
        except OSError as error:
            return error

    def digest_batch(start: int) -> list[str | OSError]:
        return [digest(path) for path in paths[start : start + _DIGESTS_PER_TASK]]

    def digest_all(pool: ThreadPoolExecutor) -> Iterator[str | OSError]:
        # A task for every file would take longer than a small file, and all tasks at once 2 KB of memory each.
        remaining = iter(range(0, len(paths), _DIGESTS_PER_TASK))
        pending = deque(pool.submit(digest_batch, start) for start in islice(remaining, _MAX_PENDING_TASKS))
        while pending:
            yield from pending.popleft().result()
            pending.extend(pool.submit(digest_batch, start) for start in islice(remaining, 1))

    with ThreadPoolExecutor(num_threads) as pool:
        progress = tqdm(digest_all(pool), desc, len(paths), unit=unit, leave=False, disable=True if silent else None)
        return list(progress)


def require_watched(dependency: Path, files: Iterable[Path]) -> None:
    """Check that DVC notices changes of files below a folder that is a dependency.

    DVC follows links to files, and a link that is the dependency itself or above it, but no link to a folder below it.

    Args:
        dependency: The folder.
        files: Files below the folder, which may be missing.

    Raises:
        UserError: The path of a file has a link to a folder below `dependency`.
    """
    parents = {file.parent for file in files}
    folders = {folder for parent in parents for folder in (parent, *parent.parents) if dependency in folder.parents}
    # Unlike the methods of Path, these functions accept any name.
    links = sorted(str(folder) for folder in folders if os.path.islink(folder) and os.path.isdir(folder))
    if links:
        link, target = shlex.quote(links[0]), shlex.quote(os.path.realpath(links[0]))
        raise UserError(
            f"{dependency}: DVC does not notice changes behind links to folders:"
            f" {summarize([f'{link} -> {os.path.realpath(link)}' for link in links])}."
            f" Replace each link with its folder, a bind mount, or links to its files"
            f" (`rm {link} && cp -rs {target} {link}`)."
        )


def write_atomically(path: Path, content: bytes | str | Iterable[memoryview]) -> None:
    """Write a file such that a crash leaves either the old content or the new content.

    Args:
        path: The file.
        content: All of it, or parts of it in order.
    """
    if isinstance(content, str):
        content = content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            with partial.open("wb") as file:
                for part in (content,) if isinstance(content, bytes) else content:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        # An error of the removal must not hide the error of the write.
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name of a file to errors of the operating system that do not name one, such as those of writes."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: Path, expected_type: type[T], remedy: str, schema: Schema | None = None) -> T:
    """Read a JSON file and check its schema and its type.

    Args:
        path: The file; a byte-order mark is skipped.
        expected_type: Type of the document: any type that pydantic validates. Unknown keys of an object are ignored.
        remedy: What the user should do about a missing or damaged file, as a sentence.
        schema: Schema that the document must record under `schema` and `schema_version`.

    Raises:
        UserError: The file is missing, unreadable, not JSON, of another schema or of another type, or an object has
            two values of one key.
    """
    return _parse_json(path, read_bytes(path, remedy), expected_type, remedy, schema)


def _parse_json(path: Path, content: bytes, expected_type: type[T], remedy: str, schema: Schema | None) -> T:
    if schema is not None:
        header = _validate(path, content, _Header, remedy)
        schema.check(path, (header["schema"], header["schema_version"]), remedy)
    value = _validate(path, content, expected_type, remedy)
    try:
        # pydantic keeps the last value of a key. It has checked syntax and depth.
        json.loads(content, object_pairs_hook=_require_unique, parse_int=_discard)
    except ValueError as error:
        raise UserError(f"{path}: {error}. {remedy}") from error
    return value


def read_json_lines(path: Path, expected_type: type[T], remedy: str) -> list[T]:
    """Read a file with a JSON value on each line, as `read_json` reads a document.

    Raises:
        UserError: The file is missing or unreadable, or a line is not JSON or of another type.
    """
    lines = read_bytes(path, remedy).splitlines()
    return [
        _validate(Path(f"{path}:{line_number}"), line, expected_type, remedy)
        for line_number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _discard(_: str) -> None:
    """Convert no integer, since only keys matter."""


def _require_unique(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"has two values of the key {json.dumps(key, ensure_ascii=False)}")


def read_bytes(path: Path, remedy: str) -> bytes:
    """Read a file and strip its byte-order mark. A file named `*.gz` is decompressed.

    Raises:
        UserError: The file is missing or unreadable; the message ends with the sentence `remedy`.
    """
    try:
        content = _decompress(path) if path.suffix == ".gz" else path.read_bytes()
        return content.removeprefix(codecs.BOM_UTF8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file. {remedy}") from error
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}. {remedy}") from error


def _decompress(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(MAX_DECOMPRESSED_SIZE + 1)
    if len(content) > MAX_DECOMPRESSED_SIZE:
        raise UserError(
            f"{path}: larger than {MAX_DECOMPRESSED_SIZE >> 30} GiB when decompressed. Decompress it first."
        )
    return content


class _Header(TypedDict):
    schema: str
    schema_version: int


def _validate(path: Path, content: bytes, expected_type: type[T], remedy: str) -> T:
    try:
        return TypeAdapter(expected_type).validate_json(content, strict=True)
    except ValidationError as error:
        faults = [f"{_json_location(fault['loc'])}{fault['msg']}" for fault in error.errors(include_url=False)]
        raise UserError(f"{path}: {summarize(faults)}. {remedy}") from error


def _json_location(keys: tuple[int | str, ...]) -> str:
    location = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return f"{location.removeprefix('.')}: " if location else ""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Equal values give equal bytes.

    Raises:
        ValueError: The value contains NaN or an infinity.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def write_document(path: Path, schema: Schema, value: Mapping[str, Any], indent: int | None = 2) -> None:
    """Write a JSON object atomically, with its schema and a digest of itself for `read_document`.

    Args:
        path: The file.
        schema: Schema of the document.
        value: JSON values by key; each key is a string.
        indent: Spaces per level; None writes one line.
    """
    document = {**schema.header, **value}
    document["document_digest"] = document_digest(document)
    write_atomically(path, json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_document(path: Path, expected_type: type[T], remedy: str, schema: Schema) -> T:
    """Read a JSON object of `write_document`, as `read_json`, and compare it with its digest.

    Raises:
        UserError: As `read_json`, or the document was altered.
    """
    (value,) = read_document_in_parts(path, expected_type, remedy, schema)
    return value


def read_document_in_parts(
    path: Path, expected_type: type[T], remedy: str, schema: Schema, key: str | None = None
) -> Iterator[T]:
    """Read a JSON object of `write_document` several times, each time with other members of a large object in it.

    The Python objects of all members at once would take up to a hundred times the memory of their text.

    Args:
        path: The file.
        expected_type: As for `read_document`.
        remedy: As for `read_document`.
        schema: As for `read_document`.
        key: Key of the large object, which `expected_type` requires; None reads the document once.

    Yields:
        The document with at most `_MEMBERS_PER_PART` members of the large object, until it has yielded all. If the
        members have objects in them, all members at once.

    Raises:
        UserError: As `read_document`. The digest is compared after the last part.
    """
    members: dict[str, str] = {}
    for content in _split_object(read_bytes(path, remedy), key):
        yield _parse_json(path, content, expected_type, remedy, schema)
        document = json.loads(content)
        part = {} if key is None else {name: _canonical_text(value) for name, value in document[key].items()}
        if repeated := members.keys() & part.keys():
            raise UserError(f"{path}: has two values of the key {json.dumps(min(repeated))}. {remedy}")
        members |= part
    recorded = document.pop("document_digest", None)
    texts: dict[str, str | Mapping[str, str]] = {name: _canonical_text(value) for name, value in document.items()}
    if key is not None:
        texts[key] = members
    if recorded != _digest_texts(texts):
        raise UserError(f"{path}: was altered: its contents do not match document_digest. {remedy}")


def _split_object(content: bytes, key: str | None) -> Iterator[bytes]:
    """Yield the text of a JSON document with one part after another of an object in it.

    It is not split if it does not have exactly one such object, or if the object has an object in it.
    """
    objects = [] if key is None else list(re.finditer(rb'(?<!\\)"%b"\s*:\s*\{([^{}]*)\}' % key.encode(), content))
    if len(objects) != 1:
        yield content
        return
    start, end = objects[0].span(1)
    commas = re.compile(rb',(?=\s*")').finditer(content, start, end)  # between members, as no value is a string
    for comma in islice(commas, _MEMBERS_PER_PART - 1, None, _MEMBERS_PER_PART):
        yield content[: objects[0].start(1)] + content[start : comma.start()] + content[end:]
        start = comma.end()
    yield content[: objects[0].start(1)] + content[start:]


def document_digest(document: Mapping[str, Any]) -> str:
    """Compute the SHA-256, in hexadecimal, of the keys and values of a JSON object in any order and layout."""
    return _digest_texts({key: _canonical_text(value) for key, value in document.items()})


def _canonical_text(value: Any) -> str:
    return _canonical_encoder.encode(value)


def _digest_texts(texts: Mapping[str, str | Mapping[str, str]]) -> str:
    """Compute `document_digest` of an object, given the canonical text of each value, or of each member of a value."""
    digest = hashlib.sha256()

    def update(texts: Mapping[str, Any]) -> None:
        separator = "{"
        for key in sorted(texts):
            digest.update(f"{separator}{_canonical_text(key)}:".encode())
            if isinstance(texts[key], str):
                digest.update(texts[key].encode())
            else:
                update(texts[key])
            separator = ","
        digest.update(b"}" if texts else b"{}")

    update(texts)
    return digest.hexdigest()


def dvc_root(path: Path) -> Path | None:
    """Return the root of the DVC repository that a file or folder is in, or None."""
    return next((folder for folder in path.absolute().parents if (folder / ".dvc").is_dir()), None)


def original_path(path: Path) -> Path:
    """Map a path in the temporary workspace of a DVC experiment to the repository that the experiment came from.

    `dvc exp run --queue` and `--temp` run stages in a clone below `.dvc/tmp/exps`, which DVC deletes afterwards.
    `DVC_ROOT` is then the original repository. Other paths are returned unchanged.
    """
    workspace, repository = dvc_root(path), os.environ.get("DVC_ROOT")
    if workspace is None or not repository or Path(repository) not in workspace.parents:
        return path
    return Path(repository) / path.absolute().relative_to(workspace)


@contextmanager
def work_folder(root: Path, stage: str, name: str) -> Iterator[Path]:
    """Open the work folder of a stage and fingerprint, and lock it for this process.

    A second process logs the id of the lock's holder and waits: the child of a killed `dvc` may still be running, or
    another experiment. On a file system without locks, the folder is not locked, and a warning is logged.

    Args:
        root: Folder of all work folders. Experiments use that of their original repository.
        stage: Name of the stage.
        name: Fingerprint of the run.

    Yields:
        The folder, `root/stage/name`, with all files of earlier runs.
    """
    folder = original_path(root) / stage / name
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder.with_name(f"{name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with naming(folder):
            _lock(lock, stage, folder)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield folder
    finally:
        os.close(lock)


def _lock(lock: int, stage: str, folder: Path) -> None:
    """Lock an open file for this process, and wait while another process holds the lock."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace") or "unknown"
            logger.info("%s: waiting for process %s, which holds %s", stage, holder, folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "%s: %s cannot be locked (%s). Nothing keeps a second process from writing to it. Run one at a time.",
            stage,
            folder,
            error.strerror,
        )


@contextmanager
def fresh_folder(target: Path) -> Iterator[Path]:
    """Make an empty temporary folder next to `target`, and remove it afterwards.

    Use it for work that is quick to repeat. The folder of a killed run is removed first.
    """
    folder = target.with_name(f".{target.name}.unfinished")
    _remove(folder)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        _remove(folder)


def publish(source: Path, target: Path) -> None:
    """Publish one finished file or folder under its final name, as `publish_together` does."""
    publish_together({target: source})


def publish_together(sources: Mapping[Path, Path]) -> None:
    """Publish finished files and folders under their final names, replacing older versions.

    All are first copied next to their final names, so an error, such as a full disk, leaves every older version. Then
    they are renamed one after the other: only a kill in that instant leaves some new and some old, until the next run.

    Files are hard-linked, or copied where the file system has no hard links, so the sources remain for a later run. A
    folder is exchanged with the older one in one step. Where the system cannot exchange names, the older folder is
    renamed to `.NAME.retired` first: a kill between the two renames leaves no folder under the final name until the
    next run.

    Args:
        sources: Finished file or folder by final name.

    Raises:
        OSError: A file cannot be written, or a folder has the final name of a file, or a file that of a folder.
    """
    staged = {target: target.with_name(f".{target.name}.staged") for target in sources}
    retired = {target: target.with_name(f".{target.name}.retired") for target in sources}
    try:
        for target, source in sources.items():
            _require_same_kind(source, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove(staged[target])
            _link_tree(source, staged[target])
            _remove(retired[target])
        with defer_interrupts():
            for target in sources:
                _replace(staged[target], target, retired[target])
        for folder in dict.fromkeys(target.parent for target in sources):
            _sync(folder)
    finally:
        for path in (*staged.values(), *retired.values()):
            # An error of the removal must not hide another, and the next run removes what remains.
            with suppress(OSError):
                _remove(path)


def _require_same_kind(source: Path, target: Path) -> None:
    """Raise an error if one of two existing paths is a file and the other a folder."""
    if target.exists() and target.is_dir() != source.is_dir():
        number = errno.EISDIR if target.is_dir() else errno.ENOTDIR
        raise OSError(number, os.strerror(number), str(target))


def _replace(staged: Path, target: Path, retired: Path) -> None:
    """Rename a file or folder to its final name. An older folder is renamed to `staged` or `retired`."""
    if target.is_dir() and not target.is_symlink():
        if _exchange(staged, target):
            return
        os.replace(target, retired)
        try:
            os.replace(staged, target)
        except OSError:
            os.replace(retired, target)
            raise
    else:
        os.replace(staged, target)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two files or folders in one step, if system and file system support it."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):  # not Linux, or an old C library
        return False
    status: int = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return status == 0


def _link_tree(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _link_tree(entry, target / entry.name)
        _sync(target)
        return
    try:
        os.link(source, target)
    except OSError:
        with naming(target):
            shutil.copyfile(source, target)
        _sync(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Sync a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync folders.
        if error.errno not in {*_UNSUPPORTED, errno.EINVAL}:
            raise
    finally:
        os.close(descriptor)
