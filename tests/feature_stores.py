"""Feature stores for tests, written without an encoder."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.features.store import EncoderSpec, FeatureStore, Grids, write_index, write_shard


def write_store(
    folder: Path, spec: EncoderSpec, image_ids: Sequence[int], grids: Grids, views: Sequence[str] = ("whole",)
) -> FeatureStore:
    """Write a feature store with one shard and open it.

    Args:
        folder: Folder of the store.
        spec: Spec of the grids.
        image_ids: Ids of the images; each has its id as the digest of its file.
        grids: float16 [N, P, C], one row for each view of each image, the views of an image adjacent.
        views: Names of the views.
    """
    digests = {image_id: f"{image_id:064x}" for image_id in image_ids}
    rows = [(image_id, view) for image_id in image_ids for view in views]
    keys = [(digests[image_id], view) for image_id, view in rows]
    shard = write_shard(folder, spec, [image_id for image_id, _ in rows], keys, grids)
    write_index(folder, spec, views, [shard], digests)
    return FeatureStore(folder)
