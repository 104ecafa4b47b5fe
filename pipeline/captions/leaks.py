"""Leaks of a dataset: images whose file is in two splits, and captions that many images share."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.artifacts import file_digest
from pipeline.captions.records import Record

# Below either, captions are shared by chance: no caption of Flickr8k, COCO's val2017 or the scenes is that of more than
# 0.3% of their images.
MIN_SHARED_IMAGES = 5
MIN_SHARED_FRACTION = 0.01

_SAMPLE_BYTES = 4096
"""Size of the part of a file that is compared before the whole."""
_MD5_OF_EMPTY = hashlib.md5(usedforsecurity=False).hexdigest()


def find_leaked_images(
    image_dir: Path, records: Iterable[Record], digests: Mapping[str, Hashable] | None = None
) -> list[list[Record]]:
    """Find the images whose files have the same bytes, in two or more splits.

    Args:
        image_dir: Folder that the records' files are relative to. Missing, unreadable and empty files have no leaks.
        records: Records of all splits.
        digests: A value for every file that only files with the same bytes share, such as its MD5, so that no file is
            read; None compares files of the same size in different splits, 4 kB of each first.

    Returns:
        The images of each such file, by image id.
    """
    groups = [list(records)]
    if digests is not None:
        groups = _split_group(groups[0], lambda record: digests[record.file])
    else:
        for key in (_size, _sample, file_digest):
            of_file = partial(_key_of_file, key, image_dir)
            groups = [part for group in groups for part in _split_group(group, of_file)]
    return sorted((sorted(group, key=lambda record: record.image_id) for group in groups), key=lambda g: g[0].image_id)


def _key_of_file(key: Callable[[Path], Hashable], image_dir: Path, record: Record) -> Hashable:
    return key(image_dir / record.file)


def _split_group(records: Sequence[Record], key: Callable[[Record], Hashable]) -> list[list[Record]]:
    """Group images by a key of their files, and keep the groups that are in two or more splits."""
    groups: dict[Hashable, list[Record]] = defaultdict(list)
    for record in records:
        try:
            groups[key(record)].append(record)
        except OSError:  # `encode` names the file
            continue
    for empty in (0, _MD5_OF_EMPTY):
        groups.pop(empty, None)
    return [group for group in groups.values() if len({record.split for record in group}) > 1]


def _size(path: Path) -> int:
    return os.stat(path).st_size


def _sample(path: Path) -> bytes:
    """Read the middle of a file, since the beginnings of image files are alike."""
    with path.open("rb") as file:
        file.seek(max(0, (_size(path) - _SAMPLE_BYTES) // 2))
        return file.read(_SAMPLE_BYTES)


def count_caption_images(records: Iterable[Record]) -> Counter[str]:
    """Count the images of each caption, ignoring case, surrounding spaces and a final period."""
    return Counter(
        caption for record in records for caption in {text.casefold().rstrip(" .") for text in record.captions}
    )


def shared_captions(num_images_by_caption: Counter[str], num_images: int) -> list[tuple[str, int]]:
    """Return the captions that many images share, with their numbers of images, the most first.

    Args:
        num_images_by_caption: Result of `count_caption_images`.
        num_images: Number of images of the dataset.
    """
    threshold = min_shared_images(num_images)
    return [(caption, count) for caption, count in num_images_by_caption.most_common() if count >= threshold]


def min_shared_images(num_images: int) -> int:
    """Return from how many images on a caption is shared by many images, in a dataset of `num_images` images."""
    return max(MIN_SHARED_IMAGES, -(-num_images // round(1 / MIN_SHARED_FRACTION)))
