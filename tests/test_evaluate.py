"""The stage `evaluate`, and its steps `score` and `analyze`, on a small trained captioner."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions.records import Record, read_records, write_records
from pipeline.decoder.model_io import (
    Refinement,
    read_history,
    read_model,
    write_history,
    write_model,
    write_refine_history,
)
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
from stages import evaluate_captions
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
    published=(),
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
    assert written["published"] == []
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
    usage = analysis.captions["word_usage"]
    # "green" is wrong; "one" is in every second reference.
    assert (usage["generated"]["precision"], usage["reference"]["precision"]) == (12 / 16, 16 / 20)
    (row,) = usage["number_words"]
    assert row.items() >= {"phrase": "one", "said": 0, "right": 0, "in_references": 4.0, "image_id": 0}.items()
    assert analysis.captions["human_agreement"]["num_images"] == 8
    # Per caption: a, color, thing, <end>.
    assert analysis.teacher_forcing["num_tokens"] == 8 * 2 * 4
    assert analysis.teacher_forcing["perplexity"] == pytest.approx(math.exp(analysis.teacher_forcing["loss"]), abs=1e-4)
    assert analysis.scenes == {"num_images": 0}


def test_a_refined_model_is_compared_with_its_trained_model(data: EvaluationData, tmp_path: Path) -> None:
    captions = {image_id: ("a", "green", "thing") for image_id in data.generated}
    captions[0] = ("a", color(0), "thing")
    refined = replace(data, trained_captions=captions)
    scores = score(refined, PARAMS, tmp_path)
    before, after = (scores.summary["refinement"]["CIDEr-D"][name] for name in ("trained", "refined"))
    assert after == scores.summary["CIDEr-D"] > before
    assert scores.summary["refinement"]["CIDEr-D"]["difference"] == pytest.approx(after - before, abs=1e-5)
    low, high = scores.summary["refinement"]["CIDEr-D"]["interval"]
    assert low < after - before < high
    analysis = analyze(refined, scores.corpus, PARAMS, tmp_path, torch.device("cpu"), batch_size=8)
    assert list(analysis.captions["diversity"]) == ["generated", "trained", "reference", "protocol"]
    assert analysis.captions["diversity"]["trained"]["num_distinct_captions"] == 2
    assert "refinement" not in score(data, PARAMS, tmp_path).summary
    unrefined = analyze(data, scores.corpus, PARAMS, tmp_path, torch.device("cpu"), batch_size=8)
    assert "trained" not in unrefined.captions["diversity"]


def refine_model(tiny: Tiny, folder: Path) -> Path:
    """Copy the model as one whose refinement kept the trained weights."""
    model = read_model(tiny.model)
    refinement = Refinement(trained_fingerprint=model.config.fingerprint, epoch=0, selected_by="cider")
    config = replace(model.config, fingerprint="refined", refinement=refinement)
    write_model(folder, model.decoder.state_dict(), model.vocabulary, config)
    history = read_history(tiny.model, model.config)
    write_history(folder, history)
    last = {name: value for name, value in history[-1].items() if name != "train_loss"}
    write_refine_history(folder, [last | {"epoch": 0, "train_reward": None}])
    return folder


def test_captions_before_refinement_are_read_and_shown(inputs: EvaluateInputs, tiny: Tiny, tmp_path: Path) -> None:
    inputs = replace(inputs, model=refine_model(tiny, tmp_path / "refined"))
    with pytest.raises(UserError, match=r"trained_captions\.json: no such file"):
        read_inputs(inputs, "val")
    caption = {"caption": "an odd one", "words": ["an", "odd", "one"]}
    rows = [{"image_id": image_id, **caption} for image_id in range(0, 40, 5)]
    path = inputs.generated / "trained_captions.json"
    path.write_text(json.dumps(rows))
    (tmp_path / "results").mkdir()
    outputs = run_stage(inputs, tmp_path / "results")
    assert b"an odd one" in outputs["report.html"]
    assert b"self-critical training" in outputs["model_card.md"]
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(UserError, match=r"trained_captions\.json: has captions of other images"):
        read_inputs(inputs, "val")
    path.write_text(json.dumps(rows + rows[:1]))
    with pytest.raises(UserError, match=r"trained_captions\.json: has an image twice"):
        read_inputs(inputs, "val")


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


def run_stage(inputs: EvaluateInputs, folder: Path, params: EvaluateParams = PARAMS) -> dict[str, bytes]:
    """Run the stage, and return the content of each output by path below `folder`."""
    sections = {
        "dataset": {"root": str(inputs.image_dir.parent), "images": inputs.image_dir.name},
        "generate": {"split": "val"},
        "evaluate": asdict(params),
    }
    (folder / "params.yaml").write_text(json.dumps(sections))
    evaluate_captions.main(
        params=folder / "params.yaml",
        prepared=inputs.prepared,
        tokens=inputs.tokens,
        features=inputs.features,
        model=inputs.model,
        generated=inputs.generated,
        metrics=folder / "metrics",
        plots=folder / "plots",
        report=folder / "report.html",
        card=folder / "model_card.md",
        device="cpu",
    )
    return read_outputs(folder)


def read_outputs(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "params.yaml"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_an_unreadable_image_leaves_every_old_output(inputs: EvaluateInputs, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    inputs = replace(inputs, image_dir=shutil.copytree(inputs.image_dir, tmp_path / "images"))
    before = run_stage(inputs, folder)
    assert {"metrics/scores.json", "plots/loss.png", "report.html", "model_card.md"} <= before.keys()
    (inputs.image_dir / "35.png").unlink()
    every_image = replace(PARAMS, bootstrap_samples=200, report=ReportParams(best=8, worst=0, random=0))
    with pytest.raises(UserError, match=r"35\.png"):
        run_stage(inputs, folder, every_image)
    assert read_outputs(folder) == before


@pytest.mark.parametrize(
    ("num_images", "caption"), [(8, ""), (8, "red"), (8, "one red thing"), (1, ""), (1, "one red thing")]
)
def test_every_score_is_a_number_or_not_defined(
    inputs: EvaluateInputs, tmp_path: Path, num_images: int, caption: str
) -> None:
    records = read_records(inputs.prepared, "val")[:num_images]
    write_records(tmp_path / "few", records)
    write_generated(tmp_path / "same", {record.image_id: caption for record in records})
    inputs = replace(inputs, prepared=tmp_path / "few", generated=tmp_path / "same")
    (tmp_path / "results").mkdir()
    outputs = run_stage(inputs, tmp_path / "results", replace(PARAMS, report=ReportParams(best=9, worst=9, random=9)))
    scores, captions = (json.loads(outputs[f"metrics/{name}.json"]) for name in ("scores", "captions"))
    assert not any(b"NaN" in content or b"Infinity" in content for content in outputs.values())
    assert (captions["diversity"]["generated"]["distinct_bigram_rate"] is None) == (len(caption.split()) < 2)
    assert ("CIDEr-D" in scores) == (num_images > 1)
    page = outputs["report.html"].decode()
    assert ("not defined" in page) == (num_images == 1 or len(caption.split()) < 2)
    assert page.count("<article") == num_images
    assert ("not defined for one image" in outputs["model_card.md"].decode()) == (num_images == 1)


def test_an_altered_shard_is_rejected(inputs: EvaluateInputs, tmp_path: Path) -> None:
    features = Path(shutil.copytree(inputs.features, tmp_path / "features"))
    (shard,) = features.glob("*.h5")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    store = read_inputs(replace(inputs, features=features), "val").store
    with pytest.raises(UserError, match=rf"{shard.name}: SHA-256 differs from index.json"):
        store.grid(store.image_ids[0])
