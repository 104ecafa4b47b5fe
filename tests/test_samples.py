import io
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.samples import NUM_SAMPLES, SCENE_SIZE, THUMBNAIL_SIZE, dataset_samples, sample_images, thumbnails
from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from tests.image_files import encode_jpeg, red_blue_image


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Make a folder with params and a dataset of 40 images, of which those with even ids are the test split."""
    (tmp_path / "params.yaml").write_text(f"dataset:\n  root: {tmp_path / 'dataset'}\n  images: images\n")
    (tmp_path / "dataset" / "images").mkdir(parents=True)
    records = []
    for image_id in range(40):
        split = "train" if image_id % 2 else "test"
        records.append(Record(image_id=image_id, file=f"{image_id}.jpg", split=split, captions=("a dog",)))
        (tmp_path / "dataset" / "images" / f"{image_id}.jpg").write_bytes(encode_jpeg(red_blue_image(8 + image_id, 8)))
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    write_records(tmp_path / "data" / "prepared", records)
    return tmp_path


def test_samples_are_spread_over_the_test_split(repository: Path) -> None:
    samples = dataset_samples(repository / "params.yaml", repository / "data" / "prepared")
    assert [sample.name for sample in samples] == [f"{4 * index}.jpg" for index in range(NUM_SAMPLES)]
    with Image.open(io.BytesIO(samples[1].content)) as image:
        assert image.size == (12, 8)


def test_missing_params_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml"):
        dataset_samples(tmp_path / "params.yaml", tmp_path / "data" / "prepared")


@pytest.mark.slow
def test_scenes_replace_a_missing_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample_images.clear()
    thumbnails.clear()
    samples = sample_images()
    assert len({sample.content for sample in samples}) == NUM_SAMPLES
    for content, size in ((samples[0].content, SCENE_SIZE), (thumbnails()[0], THUMBNAIL_SIZE)):
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (size, size)
    sample_images.clear()
    thumbnails.clear()


@pytest.mark.slow
def test_samples_are_read_from_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    sample_images.clear()
    assert [sample.name for sample in sample_images()][:2] == ["0.jpg", "4.jpg"]
    (repository / "dataset" / "images" / "4.jpg").unlink()
    sample_images.clear()
    assert sample_images()[0].name == "scene 1"
    sample_images.clear()
