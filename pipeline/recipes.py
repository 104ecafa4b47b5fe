"""Recipes: YAML files that say where the files of a dataset are, how to verify them and what to unpack."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.archives import unpack
from pipeline.downloads import Digest, download, is_intact, locked, partial_path
from pipeline.errors import UserError
from pipeline.params import check, find_yaml, params_section, read_yaml

WORK_FOLDER = ".downloads"
"""Folder below the dataset for archives that are removed after they are unpacked."""


def _require_relative(path: str) -> str:
    """Check that a path is inside its folder.

    Raises:
        ValueError: The path is empty, absolute, or has `..`.
    """
    if not PurePosixPath(path).parts or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"must be a path inside the folder, got {path!r}")
    return path


def _require_name(name: str) -> str:
    """Check that a string is the name of a file.

    Raises:
        ValueError: The string is a path, empty or hidden.
    """
    if PurePosixPath(name).name != name or name.startswith("."):
        raise ValueError(f"must be a file name, got {name!r}")
    return name


RelativePath = Annotated[str, AfterValidator(_require_relative)]
FileName = Annotated[str, AfterValidator(_require_name)]


@params_section
class RecipeFile:
    """A file of a dataset, to download."""

    url: str | None = None
    """HTTP address; null if people must ask for the file on a web page."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Size in bytes, which is verified."""
    approximate_size: Annotated[int, Field(gt=0)] | None = None
    """Size in bytes, for messages only, if the exact size is not known."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """SHA-256 in hexadecimal."""
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = None
    """MD5 in hexadecimal, for publishers that have no SHA-256."""
    unpack: list[RelativePath] = field(default_factory=list)
    """Files and folders to unpack into the dataset folder; empty for a file that is not an archive."""

    @property
    def digest(self) -> Digest | None:
        """The digest to verify, if the recipe has one."""
        if self.sha256 is not None:
            return Digest("sha256", self.sha256)
        return None if self.md5 is None else Digest("md5", self.md5)

    @property
    def known_size(self) -> int:
        """Size in bytes, approximate if the exact size is not known, 0 if neither is."""
        return self.size or self.approximate_size or 0


@params_section
class Recipe:
    """A dataset to download."""

    title: str
    """Name and source of the dataset."""
    license: str
    """License or terms of use."""
    page: str
    """Web page of the dataset."""
    root: str
    """Default dataset folder."""
    files: dict[FileName, RecipeFile]
    """Files by name."""
    preset: str | None = None
    """Preset that trains on the dataset."""
    settings: list[str] = field(default_factory=list)
    """Arguments KEY=VALUE of `gridcap use` after the preset."""


def find_recipe(name: str, folder: Path) -> Path:
    """Return the path of a recipe.

    Args:
        name: Name of a recipe in `folder`, or path of a YAML file.
        folder: Folder of the recipes.

    Raises:
        UserError: There is no such recipe.
    """
    return find_yaml(name, folder, "recipe", "weights:ARCHITECTURE such as weights:resnet50")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UserError: The file is not a valid recipe.
    """
    return check(read_yaml(path), path.stem, Recipe, str(path))


class DatasetDownload:
    """The download of a dataset to a folder."""

    def __init__(
        self, recipe: Recipe, root: Path, archives: Path | None, mirror: str | None, only: Sequence[str]
    ) -> None:
        """Plan a download.

        Args:
            recipe: The recipe.
            root: Dataset folder.
            archives: Folder to keep archives in; None removes each archive after it is unpacked.
            mirror: URL of a folder to download the files from, instead of the addresses in the recipe.
            only: Names of files to download; all if empty.

        Raises:
            UserError: The recipe has no such file.
        """
        if unknown := [name for name in only if name not in recipe.files]:
            raise UserError(f"--only {unknown[0]}: the recipe has no such file. Use {', '.join(recipe.files)}.")
        self._recipe, self._root = recipe, root
        self._archives = archives
        self._mirror = mirror
        self._files = {name: file for name, file in recipe.files.items() if name in only or not only}

    def describe(self) -> Iterator[str]:
        """Yield lines with title, license, and the size and state of each file."""
        yield f"{self._recipe.title} ({self._recipe.page})"
        yield f"License: {self._recipe.license}"
        for name, file in self._files.items():
            state = "" if self._missing(name, file) else ", already there"
            unverified = "" if file.digest else ", cannot be verified (the recipe has no digest)"
            yield f"{name}: {_format_size(file)}{state}{unverified}"

    def run(self) -> None:
        """Download, verify and unpack the files that are missing. Archives are removed unless they are to be kept.

        Raises:
            UserError: A file cannot be downloaded, verified or unpacked, or the disk has too little space.
            OSError: A file cannot be written.
        """
        pending = {name: file for name, file in self._files.items() if self._missing(name, file)}
        for name, file in pending.items():
            if self._url(name, file) is None and not self._download_path(name, file).is_file():
                raise self._unavailable(name, "cannot be downloaded without a request")
        self._root.mkdir(parents=True, exist_ok=True)
        with locked(self._root):
            self._require_space(pending)
            try:
                for name, file in pending.items():
                    path = self._download_path(name, file)
                    self._fetch(name, file, path)
                    if file.unpack:
                        unpack(path, self._missing(name, file), self._root)
                        if self._archives is None:
                            path.unlink()
            finally:
                with suppress(OSError):  # the folder does not exist, or has unfinished downloads
                    (self._root / WORK_FOLDER).rmdir()

    def _missing(self, name: str, file: RecipeFile) -> list[str]:
        """Return the paths below the dataset folder that do not exist yet."""
        return [path for path in file.unpack or [name] if not (self._root / path).exists()]

    def _download_path(self, name: str, file: RecipeFile) -> Path:
        if not file.unpack:
            return self._root / name
        return (self._archives or self._root / WORK_FOLDER) / name

    def _url(self, name: str, file: RecipeFile) -> str | None:
        return f"{self._mirror.rstrip('/')}/{name}" if self._mirror else file.url

    def _fetch(self, name: str, file: RecipeFile, path: Path) -> None:
        """Download a file, or verify one that the user has put there."""
        url = self._url(name, file)
        if url is not None:
            download(url, path, file.size, file.digest)
        elif not is_intact(path, file.size, file.digest):
            raise self._unavailable(name, f"{path} has other bytes than the recipe says")

    def _unavailable(self, name: str, fault: str) -> UserError:
        return UserError(
            f"{name}: {fault}. Request the file on {self._recipe.page}, put it into a folder and name the folder with"
            " --archives."
        )

    def _require_space(self, files: Mapping[str, RecipeFile]) -> None:
        """Check the disk space for archives and their files, which are taken to be as large as their archives.

        Raises:
            UserError: A disk has too little space.
        """
        needed: Counter[int] = Counter()
        peaks: dict[int, tuple[int, Path]] = {}

        def add(folder: Path, size: int) -> int:
            existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            device = existing.stat().st_dev
            needed[device] += size
            peaks[device] = max(peaks.get(device, (0, existing)), (needed[device], existing))
            return device

        for name, file in files.items():
            path = self._download_path(name, file)
            received = sum(part.stat().st_size for part in (path, partial_path(path)) if part.is_file())
            device = add(path.parent, max(file.known_size - received, 0))
            if file.unpack:
                add(self._root, file.known_size)
                if self._archives is None:
                    needed[device] -= file.known_size
        for size, folder in peaks.values():
            free = shutil.disk_usage(folder).free
            if size > free:
                raise UserError(
                    f"{folder}: {size:,} bytes are needed for archives and their files, but {free:,} are free. Free"
                    " disk space, or use --root and --archives on other disks."
                )


def _format_size(file: RecipeFile) -> str:
    if not file.known_size:
        return "unknown size"
    return f"{'' if file.size else 'about '}{file.known_size / 1e6:,.1f} MB"
