"""Unpacking of archives: whole, damaged and malicious ones."""

import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import archives
from pipeline.archives import unpack
from pipeline.errors import UserError

FILES = {
    "images/a.jpg": b"a" * 50,
    "images/deep/b.jpg": b"b" * 60,
    "captions.txt": b"image,caption",
    "extra/c": b"c",
    "__MACOSX/._a.jpg": b"",
}
WANTED = ["images", "captions.txt"]


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_only_what_is_named_is_unpacked(tmp_path: Path, root: Path, mode: str) -> None:
    path = tmp_path / "archive"
    write_zip(path, FILES) if mode == "zip" else write_tar(path, FILES, mode)
    (root / ".archive.unfinished").mkdir()  # of a killed run
    (root / ".archive.unfinished" / "stale").touch()
    unpack(path, WANTED, root)
    assert contents(root) == {name: FILES[name] for name in ("images/a.jpg", "images/deep/b.jpg", "captions.txt")}
    assert sorted(os.listdir(root)) == ["captions.txt", "images"]


def test_a_file_in_a_folder_that_exists_is_added_to_it(tmp_path: Path, root: Path) -> None:
    (root / "images").mkdir()
    unpack(write_zip(tmp_path / "a.zip", FILES), ["images/a.jpg"], root)
    unpack(write_zip(tmp_path / "b.zip", FILES), ["images/deep"], root)
    assert contents(root).keys() == {"images/a.jpg", "images/deep/b.jpg"}


def link(archive: tarfile.TarFile | zipfile.ZipFile, name: str, target: str) -> None:
    if isinstance(archive, zipfile.ZipFile):
        zip_info = zipfile.ZipInfo(name)
        zip_info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(zip_info, target)
    else:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        archive.addfile(info)


def special(kind: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("images/a.jpg")
            info.type, info.linkname = kind, "captions.txt"
            archive.addfile(info)

    return write


def zip_link(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        link(archive, "images", "/etc")
        archive.writestr("images/a.jpg", b"overwritten")


def tar_link(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        link(archive, "skipped", "/etc")


def encrypted(path: Path) -> None:
    write_zip(path, FILES)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)


def twice(path: Path) -> None:
    write_tar(path, {"images/a.jpg": b"1", "images/b.jpg": b"2", "images/./a.jpg": b"3"})


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", bytes(10_000_000))


def tar_bomb(path: Path) -> None:
    write_tar(path, {"images/a.jpg": bytes(10_000_000)})


def overlapping_bomb(path: Path) -> None:
    """Many names of the same compressed bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", os.urandom(1000) + bytes(20_000))
        first = archive.infolist()[0]
        for index in range(100):
            info = zipfile.ZipInfo(f"images/{index}.jpg")
            info.compress_type, info.CRC, info.header_offset = first.compress_type, first.CRC, first.header_offset
            info.file_size, info.compress_size = first.file_size, first.compress_size
            archive.filelist.append(info)


@pytest.mark.parametrize(
    ("write", "fault"),
    [
        *((lambda path, name=name: write_zip(path, {name: b""}), "leads out") for name in ("../a", "/a", "a/../../b")),
        *((lambda path, name=name: write_tar(path, {name: b""}), "leads out") for name in ("../a", "/a", "a\\..\\b")),
        (zip_link, "'images' is a link"),
        (tar_link, "'skipped' is a link"),
        *((special(kind), "is a link or a special file") for kind in (b"1", b"3", b"6")),  # hard link, device, FIFO
        (encrypted, "is encrypted"),
        (twice, "occurs twice"),
        (lambda path: write_tar(path, {"a/b": b"", "a": b""}), "occurs twice"),
        (lambda path: write_tar(path, {"a": b"", "a/b": b""}), "both a file and a folder"),
        (bomb, "larger than 50 times"),
        (tar_bomb, "larger than 50 times"),
        (overlapping_bomb, "larger than 50 times"),
    ],
)  # fmt: skip
def test_an_unsafe_archive_is_refused_as_a_whole(
    tmp_path: Path, root: Path, write: Callable[[Path], object], fault: str
) -> None:
    path = tmp_path / "archive"
    write(path)
    with pytest.raises(UserError, match=f"archive: .*{fault}.*Nothing was unpacked"):
        unpack(path, WANTED, root)
    assert os.listdir(root) == []
    assert sorted(os.listdir(tmp_path)) == ["archive", "dataset"]


def test_a_size_that_is_larger_than_declared_is_refused(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "archive"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", bytes(10_000_000))
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<L", 10_000_000), struct.pack("<L", 100)))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(path, ["images"], root)
    assert os.listdir(root) == []


@pytest.mark.parametrize("format", ["zip", "tar", "gz"])
def test_a_damaged_archive_is_an_error(tmp_path: Path, root: Path, format: str) -> None:
    path = tmp_path / "archive"
    files = {f"images/{index}.jpg": os.urandom(500) for index in range(20)}
    write_zip(path, files) if format == "zip" else write_tar(path, files, "w:gz" if format == "gz" else "w")
    content = path.read_bytes()
    for damaged in (b"", b"not an archive", content[: len(content) // 2 + 50]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"archive: "):
            unpack(path, ["images"], root)
        assert os.listdir(root) == []
    for position in range(0, len(content), 977):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            unpack(path, ["images"], root)
        except UserError:
            assert os.listdir(root) == []
        else:
            assert {name: len(content) for name, content in contents(root).items()} == dict.fromkeys(files, 500)
            (root / "images").rename(tmp_path / f"images{position}")


def test_a_missing_path_is_an_error(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"a\.zip: has no Images\. "):
        unpack(write_zip(tmp_path / "a.zip", FILES), ["Images", "captions.txt"], root)
    assert os.listdir(root) == []


def test_too_little_space_is_an_error_before_anything_is_written(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_zip(tmp_path / "a.zip", FILES)
    monkeypatch.setattr(archives, "MAX_EXPANSION", 2**60)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("images/large", b"1")
        archive.infolist()[-1].file_size = 2**60
    with pytest.raises(UserError, match=r"1,152,921,504,606,847,\d+ bytes are needed to unpack a\.zip"):
        unpack(path, WANTED, root)
    assert os.listdir(root) == []
