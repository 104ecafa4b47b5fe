"""All images of a dataset through the encoder, once: a run takes up every row that earlier ones finished.

B pictures a batch, S side of the picture in px, P regions of a grid, C channels.
"""

import errno
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm

from pipeline.captions.records import Record
from pipeline.errors import UserError
from pipeline.features.encoder import (
    STRIDES,
    EncodeParams,
    GridEncoder,
    encode_grids,
    load_encoder,
    weights_digest,
)
from pipeline.features.images import Pixels, read_bytes, read_image
from pipeline.features.store import Setting, Shard, whole_shards, write_index, write_shard
from pipeline.publish import publish, work_folder

STAGE = "encode"
# What a kill may cost, and, as it decides which images share a file, part of the published bytes.
IMAGES_A_SHARD = 128
# Fixed, and the last batch padded, since convolutions may round otherwise for another batch size.
IMAGES_A_BATCH = 16

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a run did, and what it published."""

    encoded: int
    """Images that went through the ResNet in this run."""
    reused: int
    """Images that took a row of an earlier run, or of an equal file."""
    removed: int
    """Rows of earlier runs that no image needs any more."""
    shards: int
    """Files published."""
    setting: Setting

    @property
    def figures(self) -> dict[str, int]:
        """What describes the store, however many runs it took."""
        regions, channels = self.setting.grid_shape
        return {
            "images": self.encoded + self.reused,
            "shards": self.shards,
            "grid_height": self.setting.grid_height,
            "grid_width": self.setting.grid_width,
            "channels": channels,
            "bytes_an_image": regions * channels * np.dtype(np.float16).itemsize,
        }


@dataclass(frozen=True, kw_only=True)
class _Picture:
    image_id: int
    content: str
    """SHA-256 of the file's bytes."""
    pixels: Pixels | None
    """uint8 [S, S, 3]; none where a row of this content is stored."""


def encode(
    records: Sequence[Record],
    images: Path,
    params: EncodeParams,
    work: Path,
    out: Path,
    device: torch.device,
    threads: int,
) -> Encoded:
    """Encode the records' images below the folder `images` and publish them as a feature store at `out`.

    Finished shards stay in a folder of `work`, where a run after a kill, or of a changed dataset, finds them.
    A row depends on the image's bytes and the encoder setting alone. `threads` decode images ahead of the
    encoder.

    Raises `UserError` for weights that do not fit, for an image that is missing or unreadable and for a full
    disk; what stood at `out` then stands there still.
    """
    encoder = load_encoder(params).to(device)
    setting = encoder_setting(encoder, params)
    try:
        with work_folder(work, STAGE, setting.fingerprint) as folder:
            return _encode(records, images, encoder, setting, folder, out, threads)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"{error.filename or work}: cannot be written ({error.strerror}); free space and run again:"
            " finished shards are kept"
        ) from error


def encoder_setting(encoder: GridEncoder, params: EncodeParams) -> Setting:
    """Tell the setting of the features that a loaded encoder gives."""
    side = params.image_size // STRIDES[params.layer]
    return Setting(
        architecture=params.architecture,
        layer=params.layer,
        weights_digest=weights_digest(encoder),
        image_size=params.image_size,
        precision=params.precision,
        grid_height=side,
        grid_width=side,
        channels=encoder.channels,
    )


def _encode(
    records: Sequence[Record],
    images: Path,
    encoder: GridEncoder,
    setting: Setting,
    folder: Path,
    out: Path,
    threads: int,
) -> Encoded:
    shards = whole_shards(folder)
    stored = {content for shard in shards for content in shard.contents}
    contents: dict[int, str] = {}
    group: dict[str, _Picture] = {}
    reused = 0
    with tqdm(total=len(records), desc=STAGE, unit="image", disable=None) as bar:
        for picture in _read_ahead(records, images, setting.image_size, frozenset(stored), threads):
            contents[picture.image_id] = picture.content
            if picture.content in stored or picture.content in group:
                reused += 1
                bar.set_postfix(reused=reused, refresh=False)
                bar.update()
                continue
            group[picture.content] = picture
            if len(group) == IMAGES_A_SHARD:
                shards.append(_encode_shard(list(group.values()), encoder, setting, folder, bar))
                stored.update(group)
                group.clear()
        if group:
            shards.append(_encode_shard(list(group.values()), encoder, setting, folder, bar))
    needed = set(contents.values())
    used = sorted((s for s in shards if not needed.isdisjoint(s.contents)), key=lambda shard: shard.path.name)
    _publish(folder / "published", setting, used, contents, out)
    return Encoded(
        encoded=len(contents) - reused,
        reused=reused,
        removed=len(stored - needed),
        shards=len(used),
        setting=setting,
    )


def _read_ahead(
    records: Sequence[Record], images: Path, size: int, stored: frozenset[str], threads: int
) -> Iterator[_Picture]:
    """Read the images by ascending id, decoded where they are not stored, a shard ahead of the encoder."""

    def read(record: Record) -> _Picture:
        path = images / record.file
        file = read_bytes(path)
        content = sha256(file).hexdigest()
        pixels = None if content in stored else read_image(file, size, str(path))
        return _Picture(image_id=record.image_id, content=content, pixels=pixels)

    with ThreadPoolExecutor(threads) as pool:
        coming: deque[Future[_Picture]] = deque()
        for record in sorted(records, key=lambda record: record.image_id):
            coming.append(pool.submit(read, record))
            if len(coming) > IMAGES_A_SHARD:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _encode_shard(
    pictures: Sequence[_Picture], encoder: GridEncoder, setting: Setting, folder: Path, bar: "tqdm[NoReturn]"
) -> Shard:
    grids = np.empty((len(pictures), *setting.grid_shape), dtype=np.float16)
    for start in range(0, len(pictures), IMAGES_A_BATCH):
        batch = pictures[start : start + IMAGES_A_BATCH]
        padded = np.zeros((IMAGES_A_BATCH, setting.image_size, setting.image_size, 3), dtype=np.uint8)
        for place, picture in enumerate(batch):
            assert picture.pixels is not None
            padded[place] = picture.pixels
        grids[start : start + len(batch)] = encode_grids(encoder, padded, setting.precision)[: len(batch)]
        bar.update(len(batch))
    image_ids = [picture.image_id for picture in pictures]
    return write_shard(folder, setting, image_ids, [picture.content for picture in pictures], grids)


def _publish(staged: Path, setting: Setting, shards: Sequence[Shard], contents: dict[int, str], out: Path) -> None:
    shutil.rmtree(staged, ignore_errors=True)
    for shard in shards:
        publish(shard.path, staged / shard.path.name)
    write_index(staged, setting, shards, contents)
    publish(staged, out)
