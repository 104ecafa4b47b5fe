"""Adopt rows that were encoded before: shards of the published store, and of its versions in DVC's cache.

DVC's cache holds a version of a folder as `files/md5/XX/YYY.dir`, a JSON list of the names and MD5s of its files. The
version is named by `dvc.lock`: in the workspace, in the commits of all branches, tags and experiments, and in the run
cache, which has an entry like those of `dvc.lock` for each run of a stage.
"""

import logging
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from pipeline.artifacts import dvc_root, file_digest, original_path, read_json
from pipeline.errors import UserError
from pipeline.features.store import (
    INDEX_FILE,
    EncoderSpec,
    RowKey,
    Shard,
    adopt_shard,
    read_keys,
    shard_digests,
    shard_name,
)

logger = logging.getLogger("gridcap")

_LOCK_FILE = "dvc.lock"

Version = Mapping[str, Path]
"""Files of one version of a store by name: the index and the shards."""


def adopt_shards(folder: Path, spec: EncoderSpec, missing: Set[RowKey], store: Path) -> list[Shard]:
    """Link shards that have missing rows into a work folder, after comparing their spec and digest.

    Nothing is read if no row is missing. A damaged shard is deleted, as DVC deletes damaged files of its cache.

    Args:
        folder: Work folder of the spec; its shards must be intact.
        spec: Spec of the encoder.
        missing: Keys of rows that no shard of the work folder has.
        store: Folder of the published store. It may be missing, since DVC deletes it before the stage runs.

    Returns:
        The adopted shards.
    """
    if not missing:
        return []
    missing = set(missing)
    adopted: list[Shard] = []
    examined: set[Path] = set()
    # Equal names mean equal rows.
    present = {path.name for path in folder.glob("shard-*.h5")}
    published = {path.name: path for path in store.iterdir()} if store.is_dir() else {}
    cache = _find_cache(store)
    for version in (published, *(cache.versions() if cache else ())):
        new = {name: path for name, path in version.items() if name not in present and path not in examined}
        if not new.keys() - {INDEX_FILE}:
            continue
        examined |= set(new.values())
        for shard in _adopt_from(new, folder, spec, missing):
            adopted.append(shard)
            present.add(shard.path.name)
            missing.difference_update(shard.keys)
        if not missing:
            return adopted
    if cache and cache.lacks_current and cache.has_remote:
        logger.warning(
            "%s: DVC's cache lacks files of the version in %s. To reuse its grids, interrupt this run with Ctrl-C, then"
            " run `dvc fetch encode` and `dvc repro`.",
            store,
            _LOCK_FILE,
        )
    return adopted


def _adopt_from(version: Version, folder: Path, spec: EncoderSpec, missing: Set[RowKey]) -> Iterator[Shard]:
    """Adopt the shards of one version that have rows in `missing`, which may shrink meanwhile."""
    try:
        digests = shard_digests(version[INDEX_FILE], spec.fingerprint)
    except (KeyError, UserError):  # incomplete, damaged or of another schema version
        return
    for name in sorted(digests.keys() & version.keys()):
        path = version[name]
        keys = read_keys(path, spec)
        # With another name, the keys are damaged.
        if keys is not None and missing.isdisjoint(keys) and name == shard_name(keys):
            continue
        shard = None if keys is None else adopt_shard(path, folder / name, digests[name], keys)
        if shard is not None:
            yield shard
            continue
        with suppress(OSError):
            if file_digest(path) != digests[name]:
                logger.warning("%s: %s is damaged. Its images are encoded again.", path, name)
                # DVC would link it into the published store again.
                path.unlink()


class _DirEntry(TypedDict):
    md5: str
    relpath: str


def copying_cache(store: Path) -> Path | None:
    """Return the folder of DVC's cache if the files of a store there take disk space of their own.

    None if DVC links its cache to the workspace, by reflinks where the file system has them, or without a repository.
    """
    cache = _find_cache(store)
    return cache.objects if cache and cache.copies else None


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """The versions of a store in DVC's cache."""

    objects: Path
    """Folder of the cached files, which are named by their MD5."""
    current: Sequence[str]
    """Names of the version in the workspace's lock file, one or none: the MD5 of its list of files, and `.dir`."""
    others: Sequence[str]
    """Names of all other versions."""
    has_remote: bool
    """Whether a DVC remote is configured."""
    copies: bool
    """Whether a file in the workspace is a copy of the cached file, not a link."""

    def versions(self) -> Iterator[Version]:
        """Yield the cached files of each version."""
        for name in (*self.current, *self.others):
            yield {name: path for name, path in self._files(name).items() if path.is_file()}

    @property
    def lacks_current(self) -> bool:
        """Whether files of the version in the workspace's lock file are missing."""
        files = [self._files(name) for name in self.current]
        return not all(paths and all(path.is_file() for path in paths.values()) for paths in files)

    def _files(self, version: str) -> Version:
        """Return the path of each file of a version, or nothing if its list of files is missing."""
        try:
            entries = read_json(self._object(version), list[_DirEntry], "")
        except UserError:
            return {}
        return {entry["relpath"]: self._object(entry["md5"]) for entry in entries if "/" not in entry["relpath"]}

    def _object(self, md5: str) -> Path:
        return self.objects / md5[:2] / md5[2:]


def _find_cache(store: Path) -> _Cache | None:
    """Find the versions of a store in the cache of its DVC repository; None without a repository or without DVC."""
    workspace = dvc_root(store)
    if workspace is None:
        return None
    try:
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc_objects.fs.generic import test_links
    except ModuleNotFoundError:
        return None
    try:
        with Repo(str(workspace)) as repo:
            objects, runs = Path(repo.cache.local.path), Path(repo.cache.legacy.path, "runs")
            has_remote = bool(repo.config["remote"])
            local = repo.cache.local
            links = test_links(local.cache_types, local.fs, local.path, local.fs, str(workspace / _LOCK_FILE))
    except DvcException as error:
        logger.warning("%s: DVC's cache cannot be opened (%s). No grids of it are reused.", workspace, error)
        return None
    out = store.absolute().relative_to(workspace).as_posix()
    lock = workspace / _LOCK_FILE
    current = _version_names(lock.read_text() if lock.is_file() else "", out)
    # The workspace of an experiment has only a part of the history.
    texts = [_committed(original_path(lock)), *(path.read_text() for path in runs.glob("*/*/*"))]
    others = dict.fromkeys(name for text in texts for name in _version_names(text, out) if name not in current)
    return _Cache(
        objects=objects, current=current, others=tuple(others), has_remote=has_remote, copies=links[:1] == ["copy"]
    )


def _version_names(text: str, out: str) -> list[str]:
    """Find the versions of an output in the text of lock files."""
    entry = rf"- path: {re.escape(out)}\n(?:\s+\w+: \S+\n)*?\s+md5: ([0-9a-f]{{32}}\.dir)\n"
    return list(dict.fromkeys(re.findall(entry, text)))


def _committed(path: Path) -> str:
    """Return the text of all committed versions of a file, the newest first; nothing without git."""

    def git(*arguments: str, stdin: str = "") -> str:
        command = ["git", "-C", str(path.parent), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace").stdout

    try:
        objects = git("rev-list", "--all", "--objects", "--full-history", "--", path.name).splitlines()
        blobs = [line.split()[0] for line in objects if line.endswith(path.name)]
        return git("cat-file", "--batch", stdin="".join(f"{blob}\n" for blob in blobs))
    except FileNotFoundError:
        return ""
