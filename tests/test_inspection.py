import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from pipeline.captions import tokens
from pipeline.captions.records import Record
from pipeline.captions.tokenizer import TokenizeParams
from pipeline.captions.vocabulary import write_vocabulary
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.features import store
from pipeline.inspection import describe, verify
from tests.factories import small_spec

REPOSITORY = Path(__file__).parents[1]

SETTING = small_spec(grid_width=3, channels=4)


def told(path: Path) -> str:
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
    write_vocabulary(folder / tokens.VOCABULARY_FILE, dataset.vocabulary)
    return folder


def write_features(folder: Path) -> Path:
    folder.mkdir()
    grids = np.zeros((4, 6, 4), dtype=np.float16)
    grids[:, 0, 0] = 3
    grids[:, 5, :2] = (3, 4)
    contents = [f"{number:064x}" for number in range(4)]
    keys = [(content, "whole") for content in contents]
    shards = [
        store.write_shard(folder, SETTING, [1, 2], keys[:2], grids[:2]),
        store.write_shard(folder, SETTING, [3, 4], keys[2:], grids[2:]),
    ]
    store.write_index(
        folder, SETTING, ("whole",), shards, {number + 1: content for number, content in enumerate(contents)}
    )
    return folder


def write_foreign(path: Path, **attributes: str | int) -> h5py.File:
    file = h5py.File(path, "w")
    file.attrs.update(attributes)
    return file


def test_tokens_are_told_as_words(tmp_path: Path) -> None:
    text = told(write_token_folder(tmp_path / "tokens") / tokens.TOKENS_FILE)
    assert "gridcap.tokens, version 2" in text
    assert "fingerprint 0123456789abcdef" in text
    assert "tokenizer: spacy.blank('en')" in text
    assert "train: 2 captions of 1 images, 6.0 ids each" in text
    assert "image 8: a cube and a cone" in text
    assert "image 9: a <unk> cube" in text
    assert "test: 0 captions of 0 images" in text
    row = next(line for line in text.splitlines() if line.startswith("  train/tokens "))
    assert row.split()[1:7] == ["2", "x", "7", "int32", "-", "56"]
    assert "ids of <start>, the words" in row


def test_tokens_without_a_vocabulary_are_told_as_ids(tmp_path: Path) -> None:
    folder = write_token_folder(tmp_path / "tokens")
    (folder / tokens.VOCABULARY_FILE).unlink()
    text = told(folder / tokens.TOKENS_FILE)
    assert "image 9: 1 4 3 5 2" in text


def test_a_grid_is_summed_up_and_drawn(tmp_path: Path) -> None:
    text = told(next(write_features(tmp_path / "features").glob("*.h5")))
    assert "grid of image" in text
    # 3, 3 and 4 in 24 numbers.
    assert "min 0, mean 0.4167, max 4, standard deviation 1.115, zeros 87.5%" in text
    assert "norm by region, 2 x 3, from 0 (blank) to 5 (@)" in text
    assert "    |++    |\n    |    @@|" in text
    row = next(line for line in text.splitlines() if line.startswith("  grid "))
    assert row.split()[1:8] == ["2", "x", "6", "x", "4", "float16", "-"]
    view = next(line for line in text.splitlines() if line.startswith("  view "))
    assert view.split()[1:3] == ["2", "string"]


def test_a_grid_that_is_not_finite_is_told_all_the_same(tmp_path: Path) -> None:
    grids = np.full((1, 6, 4), np.inf, dtype=np.float16)
    grids[0, 1, 1] = np.nan
    text = told(store.write_shard(tmp_path, SETTING, [1], [("0" * 64, "whole")], grids).path)
    assert "no finite number" in text
    assert "|??????|" in text


def test_a_folder_of_features_is_added_up(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    text = told(folder)
    first, second = sorted(folder.glob("*.h5"))
    size = first.stat().st_size + second.stat().st_size
    assert f"{folder}: 2 files, 4 rows, {size:,} bytes, {size / 4:,.0f} bytes a row; 48 bytes an image; " in text
    assert f"{second}: gridcap.features, 2 rows, {second.stat().st_size:,} bytes" in text
    assert text.count("norm by region") == 1
    assert "index.json: gridcap.features, version 2" in text
    assert "images: 4 entries" in text


def test_what_an_image_takes_is_told_beside_what_is_usual(tmp_path: Path) -> None:
    keys = [("0" * 64, "whole"), ("0" * 64, "center")]
    shard = store.write_shard(tmp_path, SETTING, [1, 1], keys, np.zeros((2, 6, 4), dtype=np.float16))
    assert "bytes an image" not in told(tmp_path)
    store.write_index(tmp_path, SETTING, ("whole", "center"), [shard], {1: "0" * 64, 2: "0" * 64})
    # Two views of 6 regions, and of 196, of 4 channels in 2, and in 4, bytes.
    assert (
        "; 96 bytes an image; 14 x 14 grids of the same channels in float32 would take 6,272 bytes an image,"
        " 65.3 times as much" in told(tmp_path)
    )


def test_a_folder_is_told_in_order_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    write_token_folder(tmp_path / "tokens")
    write_features(tmp_path / "features")
    (tmp_path / ".work").mkdir()
    write_features(tmp_path / ".work" / "features")
    (tmp_path / "captions.json").write_text('[{"schema": "of something else"}]')
    text = told(tmp_path)
    assert ".work" not in text
    assert "captions.json" not in text
    assert text.index("gridcap.vocabulary") < text.index("norm by region") < text.index("image 8: ")


def test_an_unknown_schema_is_told_by_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "attention.h5"
    with write_foreign(path, schema="gridcap.attention", schema_version=3, note="a\x1b[31m" + "b" * 200) as file:
        maps = file.create_dataset("8/maps", data=np.array([[0.25, 0.75], [0, 1]], dtype=np.float32))
        maps.attrs["description"] = "weights of the regions by word"
        file.create_dataset("8/words", data=["a", "cube"], dtype=h5py.string_dtype())
        file.create_dataset("empty", shape=(0, 3), dtype="i4")
        file["nothing"] = h5py.Empty("f4")
        file["number"] = np.int64(7)
        file["pair"] = np.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f4")])
        file["gone"] = h5py.SoftLink("/nowhere")
    text = told(path)
    assert "gridcap.attention, version 3" in text
    assert "8/maps: min 0, mean 0.5, max 1, standard deviation 0.3953, zeros 25.0%" in text
    assert "weights of the regions by word" in text
    assert "8/words: a, cube" in text
    assert "empty: empty" in text
    assert "number: 7" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 250


def test_statistics_of_a_large_dataset_are_of_its_first_rows(tmp_path: Path) -> None:
    path = tmp_path / "large.h5"
    with write_foreign(path, schema="x") as file:
        file.create_dataset("zeros", shape=(2**16, 2**10), dtype="f4", chunks=(1, 2**10))
    assert "(of the first 4,096 rows)" in told(path)


def nothing(path: Path) -> None:
    pass


def text_file(path: Path) -> None:
    path.write_text("image,caption\n")


def empty_file(path: Path) -> None:
    path.touch()


def empty_folder(path: Path) -> None:
    path.mkdir()


def foreign(path: Path) -> None:
    write_foreign(path, title="none of ours").close()


def truncated(path: Path) -> None:
    with write_foreign(path, schema="x") as file:
        file["values"] = np.arange(10_000)
    path.write_bytes(path.read_bytes()[:5000])


def damaged(path: Path) -> None:
    with write_foreign(path, schema="x") as file:
        values = np.arange(10_000)
        file.create_dataset("values", data=values, chunks=(1000,), compression="gzip", fletcher32=True)
        offset = file["values"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = bytes(100)
    path.write_bytes(content)


def tokens_without_tokens(path: Path) -> None:
    with write_foreign(path, schema=tokens.SCHEMA) as file:
        file.create_group("train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "no such file or folder"),
        (text_file, "is no HDF5 file"),
        (empty_file, "is no HDF5 file"),
        (empty_folder, "holds no HDF5 file and no index"),
        (foreign, "has no attribute 'schema'"),
        (truncated, "is damaged"),
        (damaged, "is damaged"),
        (tokens_without_tokens, "is damaged"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "artifact.h5"
    make(path)
    with pytest.raises(UserError) as error:
        told(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_damaged_index_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"schema": "gridcap.features", "images": {')
    with pytest.raises(UserError, match=r"index\.json: is no JSON"):
        told(tmp_path)


def test_whole_shards_are_counted(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    (folder / "shard-of-another-run.h5").touch()
    done = CliRunner().invoke(app, ["inspect", str(folder), "--verify"])
    assert done.exit_code == 0, done.output
    assert done.output == f"{folder}: shards compared with index.json: 2, all as they were written\n"


def test_an_altered_and_a_missing_shard_are_named_and_end_the_command_with_2(tmp_path: Path) -> None:
    folder = write_features(tmp_path / "features")
    altered, missing = sorted(folder.glob("*.h5"))
    content = bytearray(altered.read_bytes())
    content[-1] ^= 1
    altered.write_bytes(content)
    missing.unlink()
    failed = run_command("inspect", str(folder), "--verify")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("error: ")
    assert f"{altered}: its bytes are not those that were written" in failed.stderr
    assert f"{missing}: cannot be read" in failed.stderr


@pytest.mark.parametrize("make", [nothing, text_file, empty_folder, write_token_folder])
def test_only_a_feature_store_can_be_verified(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "artifact"
    make(path)
    with pytest.raises(UserError) as error:
        verify(path)
    assert str(error.value).startswith(f"{path}: is no feature store")


def test_an_index_of_something_else_is_told(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"schema": "gridcap.attention", "schema_version": 2}')
    with pytest.raises(UserError, match=r"has schema gridcap\.attention version 2, this gridcap reads"):
        verify(tmp_path)


def test_the_command_prints_and_ends_with_2_on_a_fault(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(write_token_folder(tmp_path / "tokens"))])
    assert done.exit_code == 0, done.output
    assert "a cube and a cone" in done.output
    text_file(tmp_path / "x.h5")
    failed = run_command("inspect", str(tmp_path / "x.h5"))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
