"""Unpacks zip and tar archives from untrusted sources: all entries are checked before the first one is written."""

import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from pipeline.artifacts import fresh_folder, naming
from pipeline.downloads import progress_bar
from pipeline.errors import UserError

MAX_EXPANSION = 50
"""Maximum size of all files in an archive, in sizes of the archive. COCO's annotations have 4."""

_CHUNK_SIZE = 2**20
_REMEDY = "Use another mirror, or correct the recipe."
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    ValueError,
)


class _Entry(NamedTuple):
    """A file in an archive."""

    path: PurePosixPath
    size: int
    """Declared size in bytes."""
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, names: Collection[str], root: Path) -> None:
    """Unpack some files and folders of an archive. They appear in `root` only after all have been written.

    Other entries are skipped, but must be safe, too. An interrupted run leaves only a hidden folder, which the next run
    replaces.

    Args:
        archive: A zip or tar file; a tar file may be compressed.
        names: Paths in the archive, which must not exist in `root`.
        root: Existing folder.

    Raises:
        UserError: The archive is damaged, does not have one of the paths, or has an unsafe entry: a link, a special
            file, a path out of the archive, a duplicate path, or files of more than `MAX_EXPANSION` times its size.
            The disk has too little space.
        OSError: A file cannot be written.
    """
    with _reading(archive), _open(archive) as opened, fresh_folder(root / archive.name) as work:
        entries = _select(archive, _checked(archive, opened), names)
        size = sum(entry.size for entry in entries)
        free = shutil.disk_usage(root).free
        if size > free:
            raise UserError(
                f"{root}: {size:,} bytes are needed to unpack {archive.name}, but {free:,} are free. Free disk space,"
                " then run again."
            )
        with progress_bar(f"unpack {archive.name}", size, 0) as progress:
            for entry in entries:
                _write(archive, entry, work / entry.path)
                progress.update(entry.size)
        for name in names:
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (work / name).rename(target)


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Convert errors of a damaged archive."""
    try:
        yield
    except (*_DAMAGED, OSError) as error:
        # Errors of the operating system have a number, unlike those of gzip and bz2.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{archive}: cannot be unpacked ({error or type(error).__name__}). {_REMEDY}") from error


@contextmanager
def _open(archive: Path) -> Iterator[Iterator[_Entry]]:
    """Open an archive and yield an iterator over its files."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield _zip_entries(archive, file)
    else:
        with tarfile.open(archive) as file:
            yield _tar_entries(archive, file)


def _zip_entries(archive: Path, file: zipfile.ZipFile) -> Iterator[_Entry]:
    for info in file.infolist():
        # Archives of systems without modes have 0.
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _refusal(archive, info.filename, "is a link or a special file")
        if info.flag_bits & 1:
            raise _refusal(archive, info.filename, "is encrypted")
        path = _require_inside(archive, info.filename)
        if not info.is_dir():
            yield _Entry(path, info.file_size, lambda info=info: file.open(info))  # type: ignore[misc]


def _tar_entries(archive: Path, file: tarfile.TarFile) -> Iterator[_Entry]:
    for info in file:
        if not (info.isreg() or info.isdir()):
            raise _refusal(archive, info.name, "is a link or a special file")
        path = _require_inside(archive, info.name)
        if info.isreg():
            yield _Entry(path, info.size, lambda info=info: file.extractfile(info))  # type: ignore[misc, arg-type]
    # tarfile takes a damaged or truncated header for the end.
    assert file.fileobj is not None
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("a header is damaged or missing")


def _refusal(archive: Path, name: str, fault: str) -> UserError:
    return UserError(f"{archive}: {name!r} {fault}. Nothing was unpacked. {_REMEDY}")


def _require_inside(archive: Path, name: str) -> PurePosixPath:
    """Return the path of an entry, which must not lead out of the archive."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise _refusal(archive, name, "leads out of the archive")
    return path


def _checked(archive: Path, entries: Iterator[_Entry]) -> Iterator[_Entry]:
    """Check that all entries together are not too large, and that no path occurs twice or is also a folder."""
    limit = MAX_EXPANSION * archive.stat().st_size
    size = 0
    files: set[PurePosixPath] = set()
    folders: set[PurePosixPath] = set()
    for entry in entries:
        size += entry.size
        if size > limit:
            raise _refusal(archive, str(entry.path), f"makes the files larger than {MAX_EXPANSION} times the archive")
        folders.update(entry.path.parents)
        if entry.path in files or entry.path in folders:
            raise _refusal(archive, str(entry.path), "occurs twice")
        files.add(entry.path)
        yield entry
    if conflicts := files & folders:
        raise _refusal(archive, str(min(conflicts)), "is both a file and a folder")


def _select(archive: Path, entries: Iterator[_Entry], names: Collection[str]) -> list[_Entry]:
    """Return the files that are named, and those in folders that are named."""
    wanted = set(map(PurePosixPath, names))
    found: set[PurePosixPath] = set()
    selected = []
    for entry in entries:
        if matches := wanted & {entry.path, *entry.path.parents}:
            found |= matches
            selected.append(entry)
    if missing := wanted - found:
        raise UserError(f"{archive}: has no {min(missing)}. {_REMEDY}")
    return selected


def _write(archive: Path, entry: _Entry, path: Path) -> None:
    """Write a file of exactly the declared size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), entry.open() as source, path.open("xb") as target:
        shutil.copyfileobj(source, target, _CHUNK_SIZE)
    if path.stat().st_size != entry.size:
        raise _refusal(archive, str(entry.path), "has another size than declared")
