"""The steps `score` and `analyze` on a small trained captioner."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions.records import Record, write_records
from pipeline.errors import UserError
from pipeline.evaluation.evaluate import (
    EvaluateInputs,
    EvaluateParams,
    EvaluationData,
    ReportParams,
    analyze,
    read_inputs,
    score,
)
from pipeline.generation.caption_io import GeneratedCaptions, write_captions
from tests.evaluation_data import make_caption
from tests.java_programs import needs_java
from tests.tiny_captioner import COLORS, Tiny
from tests.tiny_dataset import write_token_files

pytestmark = pytest.mark.slow

GRID = (4, 4)
PARAMS = EvaluateParams(
    tokenizer="spacy",
    meteor=False,
    spice=False,
    human_meteor=False,
    bootstrap_samples=100,
    attention_plots=0,
    report=ReportParams(best=1, worst=1, random=1),
    seed=1,
)


def color(image_id: int) -> str:
    return sorted(COLORS)[image_id % len(COLORS)]


def write_generated(folder: Path, captions: dict[int, str]) -> None:
    """Write generated captions with uniform attention."""

    def generated(image_id: int, words: Sequence[str]) -> GeneratedCaptions:
        attention = np.full((len(words), *GRID), 1 / math.prod(GRID), np.float16)
        return GeneratedCaptions(image_id=image_id, captions=(make_caption(tuple(words), attention),))

    folder.mkdir()
    rows = [generated(image_id, text.split()) for image_id, text in captions.items()]
    write_captions(folder, rows, len(rows), GRID, "0")


@pytest.fixture
def inputs(tiny: Tiny, tmp_path: Path) -> EvaluateInputs:
    """Write artifacts of the val split, in which the captions of even image ids are correct."""
    image_ids = range(0, 40, 5)
    records = [
        Record(
            image_id=image_id,
            file=f"{image_id:02}.png",
            split="val",
            captions=(f"a {color(image_id)} thing", f"one {color(image_id)} thing"),
            subset="even" if image_id % 2 == 0 else "odd",
        )
        for image_id in image_ids
    ]
    write_records(tmp_path / "prepared", records)
    captions = {
        image_id: f"a {color(image_id)} thing" if image_id % 2 == 0 else "a green thing" for image_id in image_ids
    }
    write_generated(tmp_path / "generated", captions)
    return EvaluateInputs(
        prepared=tmp_path / "prepared",
        image_dir=tiny.images,
        tokens=tiny.folder / "tokens",
        features=tiny.features,
        model=tiny.model,
        generated=tmp_path / "generated",
    )


@pytest.fixture
def data(inputs: EvaluateInputs) -> EvaluationData:
    return read_inputs(inputs, "val")


def test_scores_are_written_by_subset_and_by_image(data: EvaluationData, tmp_path: Path) -> None:
    scores = score(data, PARAMS, tmp_path)
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written == scores.summary
    assert written["num_images"] == 8
    assert written["subsets"]["even"]["BLEU-4"] > written["subsets"]["odd"]["BLEU-4"]
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == list(range(0, 40, 5))
    assert {row["caption"] for row in rows if row["image_id"] % 2} == {"a green thing"}
    assert all((row["ROUGE-L"] == 1) == (row["image_id"] % 2 == 0) for row in rows)


def test_the_signature_gives_the_tokenizer_of_the_tokens(data: EvaluationData, tmp_path: Path) -> None:
    (signature,) = score(data, PARAMS, tmp_path).summary["signature"]["BLEU-4"]
    assert signature.startswith("BLEU-4|refs:2|tok:spacy-3.")
    assert "|case:lower|punct:drop|" in signature


@needs_java
def test_the_ptb_tokenizer_gives_the_same_scores_on_plain_words(data: EvaluationData, tmp_path: Path) -> None:
    spacy = score(data, PARAMS, tmp_path).summary
    ptb = score(data, replace(PARAMS, tokenizer="ptb"), tmp_path).summary
    assert ptb["BLEU-4"] == spacy["BLEU-4"]
    assert ptb["signature"]["BLEU-4"][0].startswith("BLEU-4|refs:2|tok:ptb-3.4.1|")


def test_analysis_is_written(data: EvaluationData, tmp_path: Path) -> None:
    corpus = score(data, PARAMS, tmp_path).corpus
    analysis = analyze(data, corpus, PARAMS, tmp_path, torch.device("cpu"), batch_size=3)
    for name in ("captions", "teacher_forcing", "scenes"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == getattr(analysis, name)
    diversity = analysis.captions["diversity"]
    assert diversity["generated"]["num_captions"] == diversity["reference"]["num_captions"] == 8
    assert diversity["generated"]["verbatim_in_train"] == 0.5
    assert diversity["reference"]["verbatim_in_train"] == 1
    assert analysis.captions["human_agreement"]["num_images"] == 8
    # Per caption: a, color, thing, <end>.
    assert analysis.teacher_forcing["num_tokens"] == 8 * 2 * 4
    assert analysis.teacher_forcing["perplexity"] == pytest.approx(math.exp(analysis.teacher_forcing["loss"]), abs=1e-4)
    assert analysis.scenes == {"num_images": 0}


def test_teacher_forcing_does_not_depend_on_the_batch_size(data: EvaluationData, tmp_path: Path) -> None:
    corpus = score(data, PARAMS, tmp_path).corpus
    results = [
        analyze(data, corpus, PARAMS, tmp_path, torch.device("cpu"), batch_size).teacher_forcing
        for batch_size in (1, 8)
    ]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)
    assert results[0]["num_tokens"] == results[1]["num_tokens"]


def test_captions_of_other_images_are_rejected(inputs: EvaluateInputs, tmp_path: Path) -> None:
    write_generated(tmp_path / "other", {0: "a red thing", 77: "a red thing"})
    with pytest.raises(UserError) as error:
        read_inputs(replace(inputs, generated=tmp_path / "other"), "val")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'other'}: ")
    assert "1 of the 8 images of split val" in message
    assert "1 other" in message


def test_tokens_of_another_vocabulary_are_rejected(inputs: EvaluateInputs, tmp_path: Path) -> None:
    record = Record(image_id=0, file="0.jpg", split="train", captions=("zebra",))
    write_token_files(tmp_path, [record])
    with pytest.raises(UserError, match=r"tokens\.h5: was written with vocabulary "):
        read_inputs(replace(inputs, tokens=tmp_path / "tokens"), "val")


def test_a_damaged_history_is_rejected(inputs: EvaluateInputs, tiny: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "history.json").write_text('[{"epoch": "one"}]')
    with pytest.raises(UserError, match=r"history\.json: \[0\]\.epoch"):
        read_inputs(replace(inputs, model=model), "val")


def test_an_altered_shard_is_rejected(inputs: EvaluateInputs, tmp_path: Path) -> None:
    features = Path(shutil.copytree(inputs.features, tmp_path / "features"))
    (shard,) = features.glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = read_inputs(replace(inputs, features=features), "val").store
    with pytest.raises(UserError, match=rf"{shard.name}: SHA-256 differs from index.json"):
        store.grid(store.image_ids[0])
