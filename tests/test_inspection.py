from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.captions import tokens
from pipeline.captions.records import Record
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.vocabulary import VOCABULARY_FILE, write_vocabulary
from pipeline.errors import UserError
from pipeline.features import store
from pipeline.inspection import describe, format_value, verify
from tests.command_line import gridcap, gridcap_process
from tests.factories import small_spec

SPEC = small_spec(grid_width=3, channels=4)


def describe_as_text(path: Path) -> str:
    return "\n".join(describe(path))


def write_token_folder(folder: Path) -> Path:
    folder.mkdir()
    records = [
        Record(image_id=8, file="8.jpg", split="train", captions=("A red cube .", "A cube , and a cone .")),
        Record(image_id=9, file="9.jpg", split="val", captions=("A blue cube .",)),
    ]
    params = TokenizeParams(lowercase=True, punctuation="drop", min_count=1, max_length=9)
    dataset = tokens.tokenize(records, params, Path("records.jsonl"))
    tokens.write_tokens(folder / tokens.TOKENS_FILE, dataset, params, "0123456789abcdef")
    write_vocabulary(folder / VOCABULARY_FILE, dataset.vocabulary)
    return folder


def write_features(folder: Path) -> Path:
    """Write a store of four images in two shards, with grids of 2 x 3 regions and 4 channels."""
    folder.mkdir()
    grids = np.zeros((4, 6, 4), dtype=np.float16)
    grids[:, 0, 0] = 3
    grids[:, 5, :2] = (3, 4)
    digests = [f"{index:064x}" for index in range(4)]
    keys = [(digest, "whole") for digest in digests]
    shards = [
        store.write_shard(folder, SPEC, [1, 2], keys[:2], grids[:2]),
        store.write_shard(folder, SPEC, [3, 4], keys[2:], grids[2:]),
    ]
    store.write_index(folder, SPEC, ("whole",), shards, {index + 1: digest for index, digest in enumerate(digests)})
    return folder


def create_hdf5(path: Path, **attributes: str | int) -> h5py.File:
    file = h5py.File(path, "w")
    file.attrs.update(attributes)
    return file


def test_tokens_are_shown_as_words(tmp_path: Path) -> None:
    text = describe_as_text(write_token_folder(tmp_path / "tokens") / tokens.TOKENS_FILE)
    assert f"gridcap.tokens, version {tokens.SCHEMA.version}" in text
    assert "fingerprint 0123456789abcdef" in text
    assert "tokenizer: spacy.blank('en')" in text
    assert "train: 2 captions of 1 images, 6.0 ids per caption" in text
    assert "image 8: a cube and a cone" in text
    assert "image 9: a <unk> cube" in text
    assert "test: 0 captions of 0 images" in text
    row = next(line for line in text.splitlines() if line.startswith("  train/ids "))
    assert row.split()[1:5] == ["12", "int32", "-", "48"]
    assert "ids of all captions: <start>, the words" in row


def test_tokens_without_a_vocabulary_are_shown_as_ids(tmp_path: Path) -> None:
    folder = write_token_folder(tmp_path / "tokens")
    (folder / VOCABULARY_FILE).unlink()
    text = describe_as_text(folder / tokens.TOKENS_FILE)
    assert "image 9: 1 4 3 5 2" in text


def test_first_grid_is_summarized_and_drawn(tmp_path: Path) -> None:
    text = describe_as_text(next(write_features(tmp_path / "features").glob("*.h5")))
    assert "grid of image" in text
    # The 24 values are 3, 3, 4 and zeros.
    assert "min 0, mean 0.4167, max 4, standard deviation 1.115, zeros 87.5%" in text
    assert "2 x 3, from 0 (blank) to 5 (@)" in text
    assert "    |++    |\n    |    @@|" in text
    row = next(line for line in text.splitlines() if line.startswith("  grid "))
    assert row.split()[1:8] == ["2", "x", "6", "x", "4", "float16", "-"]
    view = next(line for line in text.splitlines() if line.startswith("  view "))
    assert view.split()[1:3] == ["2", "string"]


def test_grid_with_non_finite_values_is_described(tmp_path: Path) -> None:
    grids = np.full((1, 6, 4), np.inf, dtype=np.float16)
    grids[0, 1, 1] = np.nan
    text = describe_as_text(store.write_shard(tmp_path, SPEC, [1], [("0" * 64, "whole")], grids).path)
    assert "no finite values" in text
    assert "|??????|" in text


def test_sizes_of_a_feature_store_are_summed(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    text = describe_as_text(folder)
    first, second = sorted(folder.glob("*.h5"))
    size = first.stat().st_size + second.stat().st_size
    assert f"{folder}: 2 files, 4 rows, {size:,} bytes, {size / 4:,.0f} bytes per row; 48 bytes per image " in text
    assert f"{second}: gridcap.features, 2 rows, {second.stat().st_size:,} bytes" in text
    assert text.count("L2 norm") == 1
    assert "index.json: gridcap.features, version " in text
    assert "images: 4 entries" in text


def test_size_per_image_is_compared_with_14_x_14_float32_grids(tmp_path: Path) -> None:
    keys = [("0" * 64, "whole"), ("0" * 64, "center")]
    shard = store.write_shard(tmp_path, SPEC, [1, 1], keys, np.zeros((2, 6, 4), dtype=np.float16))
    assert "bytes per image" not in describe_as_text(tmp_path)
    store.write_index(tmp_path, SPEC, ("whole", "center"), [shard], {1: "0" * 64, 2: "0" * 64})
    # 2 views x 6 regions x 4 channels x 2 bytes, and 2 views x 196 regions x 4 channels x 4 bytes.
    assert "; 96 bytes per image (as 14 x 14 x 4 float32 grids: 6,272 bytes, 65.3x)" in describe_as_text(tmp_path)


def test_folder_is_described_in_order_without_hidden_and_unrelated_files(tmp_path: Path) -> None:
    write_token_folder(tmp_path / "tokens")
    write_features(tmp_path / "features")
    (tmp_path / ".work").mkdir()
    write_features(tmp_path / ".work" / "features")
    (tmp_path / "captions.json").write_text('[{"schema": "not a header"}]')
    text = describe_as_text(tmp_path)
    assert ".work" not in text
    assert "captions.json" not in text
    assert text.index("gridcap.vocabulary") < text.index("L2 norm") < text.index("image 8: ")


def test_file_of_another_schema_is_described_by_statistics(tmp_path: Path) -> None:
    path = tmp_path / "attention.h5"
    with create_hdf5(path, schema="gridcap.attention", schema_version=3, note="a\x1b[31m" + "b" * 200) as file:
        maps = file.create_dataset("8/maps", data=np.array([[0.25, 0.75], [0, 1]], dtype=np.float32))
        maps.attrs["description"] = "weights of the regions by word"
        file.create_dataset("8/words", data=["a", "cube"], dtype=h5py.string_dtype())
        file.create_dataset("empty", shape=(0, 3), dtype="i4")
        file["null"] = h5py.Empty("f4")
        file["scalar"] = np.int64(7)
        file["pair"] = np.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f4")])
        file["broken_link"] = h5py.SoftLink("/nowhere")
    text = describe_as_text(path)
    assert "gridcap.attention, version 3" in text
    assert "8/maps: min 0, mean 0.5, max 1, standard deviation 0.3953, zeros 25.0%" in text
    assert "weights of the regions by word" in text
    assert "8/words: a, cube" in text
    assert "empty: empty" in text
    assert "scalar: 7" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 250


def test_statistics_of_a_large_dataset_use_its_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "large.h5"
    with create_hdf5(path, schema="x") as file:
        file.create_dataset("zeros", shape=(2**16, 2**10), dtype="f4", chunks=(1, 2**10))
    assert "(of the first 4,096 rows)" in describe_as_text(path)


def test_a_formatted_value_is_one_short_line_without_control_characters() -> None:
    assert format_value("a\x1b\nb") == r"a\u001b\u000ab"
    assert format_value(b"caf\xc3\xa9") == "café"
    assert format_value("x" * 11, max_length=10) == "xxxxxxx..."


def no_file(path: Path) -> None:
    pass


def text_file(path: Path) -> None:
    path.write_text("image,caption\n")


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def foreign_file(path: Path) -> None:
    create_hdf5(path, title="not written by gridcap").close()


def truncated_file(path: Path) -> None:
    with create_hdf5(path, schema="x") as file:
        file["values"] = np.arange(10_000)
    path.write_bytes(path.read_bytes()[:5000])


def corrupt_file(path: Path) -> None:
    with create_hdf5(path, schema="x") as file:
        values = np.arange(10_000)
        file.create_dataset("values", data=values, chunks=(1000,), compression="gzip", fletcher32=True)
        offset = file["values"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = bytes(100)
    path.write_bytes(content)


def tokens_without_datasets(path: Path) -> None:
    with create_hdf5(path, schema=tokens.SCHEMA.name) as file:
        file.create_group("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_file, "no such file or folder"),
        (text_file, "not an HDF5 file"),
        (empty_file, "not an HDF5 file"),
        (empty_folder, "contains no HDF5 file"),
        (foreign_file, "has no attribute 'schema'"),
        (truncated_file, "cannot be read as HDF5"),
        (corrupt_file, "cannot be read as HDF5"),
        (tokens_without_datasets, "cannot be read as HDF5"),
    ],
)
def test_unreadable_artifact_is_an_error(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "artifact.h5"
    make(path)
    with pytest.raises(UserError) as error:
        describe_as_text(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_malformed_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"schema": "gridcap.features", "images": {')
    with pytest.raises(UserError, match=r"index\.json: Invalid JSON"):
        describe_as_text(tmp_path)


def test_verify_ignores_files_that_are_not_in_the_index(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    (folder / "shard-of-another-run.h5").touch()
    result = gridcap("inspect", folder, "--verify")
    assert result.exit_code == 0, result.output
    assert result.output == f"{folder}: all shards match index.json (2)\n"


@pytest.mark.slow
def test_verify_names_altered_and_missing_shards_and_exits_with_2(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    altered, missing = sorted(folder.glob("*.h5"))
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    missing.unlink()
    result = gridcap_process("inspect", folder, "--verify")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert str(altered) in result.stderr
    assert f"{missing}: cannot be read" in result.stderr


@pytest.mark.parametrize("make", [no_file, text_file, empty_folder, write_token_folder])
def test_verify_rejects_anything_but_a_feature_store(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "artifact"
    make(path)
    with pytest.raises(UserError) as error:
        verify(path)
    assert str(error.value).startswith(f"{path}: not a feature store")


def test_verify_rejects_an_index_of_another_schema(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"schema": "gridcap.attention", "schema_version": 2}')
    with pytest.raises(UserError, match=r"index\.json: .*gridcap\.attention version 2"):
        verify(tmp_path)


def test_command_prints_the_description(tmp_path: Path) -> None:
    result = gridcap("inspect", write_token_folder(tmp_path / "tokens"))
    assert result.exit_code == 0, result.output
    assert "a cube and a cone" in result.output


@pytest.mark.slow
def test_command_exits_with_2_on_an_error(tmp_path: Path) -> None:
    text_file(tmp_path / "x.h5")
    result = gridcap_process("inspect", tmp_path / "x.h5")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
