"""The pipeline on captions of a language without spaces: images of a single color, described in Chinese."""

import json
import re
from pathlib import Path

import pytest

from pipeline.prediction.captioner import Captioner
from tests.command_line import gridcap
from tests.dvc_repository import Repository
from tests.solid_images import solid_image

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

NAMES = {"red": "红", "blue": "蓝", "white": "白"}
NUM_IMAGES = 60


@pytest.fixture(scope="module")
def chinese(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Return a repository with a Chinese dataset, in which only `prepare` has run."""
    repository = Repository.copy_project(tmp_path_factory.mktemp("chinese"))
    folder = repository.folder / "data/colors"
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for index in range(NUM_IMAGES):
        color, name = list(NAMES.items())[index % 3]
        solid_image(color).save(folder / f"images/{index}.png")
        lines += [f"{index}.png,这是一张{name}色的图片。", f"{index}.png,图片里只有{name}色"]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dataset = {
        "format": "flickr8k",
        "root": "data/colors",
        "captions": [{"file": "captions.csv", "folder": ".", "split": None}],
        "splits": {"by": "seed", "seed": 1, "val": 0.2, "test": 0.2},
    }
    lr = {"peak": 0.02, "warmup_steps": 5, "schedule": "constant", "step_epochs": 1, "step_factor": 1.0}
    train = {"max_epochs": 25, "lr": lr, "batch_size": 4, "ema_decay": 0.0, "select_by": "last"}
    repository.edit("params.yaml", dataset=dataset, train=train, evaluate={"meteor": True})
    repository.dvc("repro", "prepare")
    return repository


def test_the_default_language_refuses_captions_without_spaces(chinese: Repository) -> None:
    output = chinese.dvc_fails("repro", "tokenize")
    assert f"{2 * NUM_IMAGES} of {2 * NUM_IMAGES} captions have no spaces between words" in output
    assert "Set tokenize.language to their language, such as zh, ja or th." in output
    assert "Traceback" not in output


def test_every_stage_writes_text_without_spaces(chinese: Repository) -> None:
    folder = chinese.folder
    chinese.edit("params.yaml", tokenize={"language": "zh"})
    output = chinese.dvc("repro")
    assert re.search(r"image \d+: [^\s\d]{4,}\n", output), output  # the validation captions of `train`

    captions = {row["image_id"]: row["caption"] for row in read(folder / "data/generated/captions.json")}
    assert all(re.fullmatch(r"[一-龥]{4,}", caption) for caption in captions.values()), captions
    rows = [json.loads(line) for line in (folder / "results/metrics/images.jsonl").read_text("utf-8").splitlines()]
    assert {row["image_id"]: row["caption"] for row in rows} == captions
    for row in read(folder / "data/generated/n_best.json"):
        assert row["captions"][0]["words"] == list(captions[row["image_id"]])
    report = (folder / "results/report.html").read_text("utf-8")
    for caption in captions.values():
        assert f'aria-label="Caption: {caption}"' in report
        assert caption in re.sub(r"<[^>]*>", "", report)  # no spaces between the words
    assert report.count('lang="zh"') == 2 * len(captions)

    captioner = Captioner.load(folder / "data/model", device="cpu")
    (caption,) = captioner.caption([folder / "data/colors/images/0.png"])
    assert caption.text == "".join(caption.words)
    assert "红" in caption.words


def test_scores_are_those_of_chinese_words(chinese: Repository) -> None:
    scores = read(chinese.folder / "results/metrics/scores.json")
    assert scores["BLEU-4"] > 0.5  # 0 if captions were single words
    assert "|lang:zh|" in scores["signature"]["BLEU-4"][0]
    reason = "METEOR is for English, and the language of the captions is zh."
    assert scores["unavailable"]["METEOR"] == [reason]
    assert reason in (chinese.folder / "results/model_card.md").read_text("utf-8")

    generated, prepared = chinese.folder / "data/generated", chinese.folder / "data/prepared"
    result = gridcap("score", generated, prepared, "--language", "zh", "--json")
    assert result.exit_code == 0, result.output
    rescored = json.loads(result.stdout)
    for metric in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D"):
        assert rescored[metric] == scores[metric]
    assert rescored["signature"] == scores["signature"]

    assert "language=en does not split them. Set language" in str(gridcap("score", generated, prepared).exception)
    assert "'klingon'" in str(gridcap("score", generated, prepared, "--language", "klingon").exception)
    ptb = gridcap("score", generated, prepared, "--language", "zh", "--tokenizer", "ptb")
    assert "tokenizer ptb: is for English" in str(ptb.exception)


def test_the_ptb_tokenizer_is_refused(chinese: Repository) -> None:
    chinese.edit("params.yaml", evaluate={"tokenizer": "ptb"})
    output = chinese.dvc_fails("repro")
    assert "tokenizer ptb: is for English, and the language is zh. Use the tokenizer spacy." in output
    assert "Traceback" not in output


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))
