"""Statistics of a dataset, and `gridcap stats`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.captions.records import Record, write_records
from pipeline.evaluation.dataset_stats import DatasetStats, Range, compute_stats, stats_lines
from pipeline.features.near_duplicates import NearDuplicate, write_near_duplicates
from pipeline.features.store import FeatureStore
from tests.command_line import gridcap
from tests.dataset_files import dataset_section
from tests.factories import small_spec
from tests.feature_stores import write_store
from tests.tiny_dataset import write_token_files

RECORDS = [
    Record(image_id=1, file="1.png", split="train", captions=("a red dog", "a dog", "a dog runs")),
    Record(image_id=2, file="2.png", split="train", captions=("a red cat",)),
    Record(image_id=3, file="3.png", split="test", captions=("a blue dog", "a bird")),
    Record(image_id=4, file="4.png", split="test", captions=("a dog",)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a dataset without a val split, whose images 1 and 3 have the same file."""
    (tmp_path / "images").mkdir()
    for image_id, width in ((1, 20), (2, 30), (3, 20), (4, 25)):
        Image.new("RGB", (width, 10 + image_id % 2)).save(tmp_path / f"images/{image_id}.png")
    write_records(tmp_path / "prepared", RECORDS)
    return tmp_path


def write_tokens_and_features(folder: Path, records: list[Record] = RECORDS) -> None:
    write_token_files(folder, records)
    spec, image_ids = small_spec(), [record.image_id for record in records]
    write_store(folder / "features", spec, image_ids, np.zeros((len(image_ids), 4, 3), np.float16))
    write_near_duplicates(folder / "features", [NearDuplicate(image_id=4, other_id=2, similarity=0.9)])


def stats_of(folder: Path, image_dir: str = "images") -> DatasetStats:
    return compute_stats(folder / "prepared", folder / image_dir, folder / "tokens", folder / "features")


def test_statistics_of_records_alone(folder: Path) -> None:
    stats = stats_of(folder)
    train, val, test = (stats.splits[split] for split in ("train", "val", "test"))
    assert (train.num_images, val.num_images, test.num_images) == (2, 0, 2)
    assert (train.num_captions, val.num_captions, test.num_captions) == (4, 0, 3)
    assert train.references_per_image == Range(min=1, mean=2, max=3)
    assert val.references_per_image is None
    assert (train.num_leaked_images, val.num_leaked_images, test.num_leaked_images) == (1, 0, 1)
    assert stats.leaked_images == [["1.png (train)", "3.png (test)"]]
    assert stats.width == Range(min=20, mean=23.75, max=30)
    assert stats.max_images_per_caption == 2
    assert (stats.vocab_size, stats.vocabularies, test.unk_rate, test.num_near_duplicates) == (None, [], None, None)


def test_statistics_of_tokens_and_features(folder: Path) -> None:
    write_tokens_and_features(folder)
    stats = stats_of(folder)
    store = FeatureStore(folder / "features")
    assert stats == compute_stats(folder / "prepared", folder / "images", folder / "tokens", folder / "features", store)
    assert stats.vocab_size == 4 + 5  # a dog red cat runs
    assert stats.splits["train"].words_per_caption == Range(min=2, mean=2.75, max=3)
    assert stats.splits["train"].unk_rate == 0
    assert stats.splits["test"].unk_rate == round(2 / 7, 6)  # blue, bird
    assert stats.splits["val"].words_per_caption is stats.splits["val"].unk_rate is None
    by_min_count = {vocabulary.min_count: vocabulary for vocabulary in stats.vocabularies}
    assert by_min_count[2].num_words == 3  # a dog red
    assert by_min_count[2].coverage == {"train": round(9 / 11, 6), "val": None, "test": round(5 / 7, 6)}
    assert by_min_count[5].num_words == 0
    assert (stats.splits["train"].num_near_duplicates, stats.splits["test"].num_near_duplicates) == (None, 1)
    assert stats.near_duplicates == [["4.png (test)", "2.png (train)"]]


def test_artifacts_of_other_images_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tokens_and_features(folder, [*RECORDS[:2], Record(image_id=9, file="9", split="test", captions=("a cat",))])
    stats = stats_of(folder)
    assert stats.vocab_size is stats.splits["test"].num_near_duplicates is None
    assert [message.rpartition(" Run ")[2] for message in sorted(caplog.messages)] == [
        "`dvc repro encode`.",
        "`dvc repro tokenize`.",
    ]


def test_images_may_be_missing_or_broken(folder: Path) -> None:
    stats = stats_of(folder, "elsewhere")
    assert (stats.num_sized_images, stats.width, stats.splits["test"].num_leaked_images) == (0, None, None)
    (folder / "images/1.png").write_bytes(b"no image")
    (folder / "images/2.png").write_bytes((folder / "images/2.png").read_bytes()[:20])
    assert stats_of(folder).num_sized_images == 2


def test_lines_show_every_statistic(folder: Path) -> None:
    write_tokens_and_features(folder)
    lines = [line.split() for line in stats_lines(stats_of(folder))]
    assert ["images", "2", "0", "2"] in lines
    assert ["unknown", "words", "0.00%", "-", "28.57%"] in lines
    assert ["near-duplicates", "in", "another", "split", "-", "0", "1"] in lines
    assert ["2", "3", "81.82%", "-", "71.43%"] in lines
    assert ["4.png", "(test)", "and", "2.png", "(train)"] in lines


def test_the_command_prints_text_or_json(folder: Path) -> None:
    (folder / "params.yaml").write_text(json.dumps({"dataset": dataset_section(folder, images="images")}))
    options = [f"--{name}={folder / name}" for name in ("prepared", "tokens", "features")]
    options.append(f"--params={folder / 'params.yaml'}")
    text, as_json = gridcap("stats", *options), gridcap("stats", *options, "--json")
    assert (text.exit_code, as_json.exit_code) == (0, 0), (text.output, as_json.output)
    assert "1.png (train) = 3.png (test)" in text.stdout
    assert json.loads(as_json.stdout)["splits"]["train"]["num_leaked_images"] == 1
