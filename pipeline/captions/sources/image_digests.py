"""A digest of all images of a dataset, by which DVC notices changed images in the stages after `prepare`.

DVC looks at every file of a dependency each time it runs, at 123,287 images for about 3 seconds. Therefore only
`prepare` depends on the dataset, and `encode` on the digest that `prepare` writes.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.artifacts import Schema, dvc_root, write_json

SCHEMA = Schema("gridcap.image_digest", 1)
_BATCH_SIZE = 1000


def image_md5s(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Compute the MD5 of image files.

    Files that DVC hashed before are not read, such as all files when `dvc repro` runs `prepare`.

    Args:
        folder: The image folder.
        files: Paths below it.

    Returns:
        The MD5 of each file, as 32 hexadecimal digits.
    """
    paths = {os.path.abspath(folder / file): file for file in files}
    known = dict(_known_md5s(list(paths)))
    unknown = [path for path in paths if path not in known]
    with ThreadPoolExecutor() as executor:
        known |= zip(unknown, executor.map(_md5, unknown), strict=True)
    return {file: known[path] for path, file in paths.items()}


def write_image_digest(path: Path, md5s: Mapping[str, str]) -> None:
    """Write the number of images, and the SHA-256 of the lines `FILE MD5` in ascending order."""
    lines = "".join(f"{file} {md5}\n" for file, md5 in sorted(md5s.items()))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    write_json(path, {**SCHEMA.header, "num_images": len(md5s), "sha256": digest})


def _known_md5s(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the absolute paths whose MD5 DVC knows, of files that have not changed since."""
    repository = dvc_root(Path.cwd() / "dvc.yaml")
    if repository is None:
        return
    try:
        from dvc.repo import Repo
        from dvc_objects.fs.local import localfs
    except ModuleNotFoundError:
        return
    with Repo(str(repository)) as repo:
        for start in range(0, len(paths), _BATCH_SIZE):
            batch = paths[start : start + _BATCH_SIZE]
            infos = {path: localfs.info(path) for path in batch}
            for path, _, digest in repo.state.get_many(batch, localfs, infos):
                if digest is not None and digest.name == "md5":
                    yield path, digest.value


def _md5(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
