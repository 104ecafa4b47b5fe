"""`gridcap score` and `gridcap compare`, as their users run them."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.errors import UserError

with_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no java on the PATH")

REFERENCES = {
    1: ["A dog runs on the grass.", "A brown dog is running (fast) over grass!", "Dogs can't fly."],
    2: ["A man rides a red bike.", "a man on a bike"],
    3: ["Two children play in the water.", "Kids play in a pool.", "Two kids in the water, playing.", "Water."],
    4: ["A plate of food."],
}
GOOD = {1: "A dog runs over the grass.", 2: "A man rides a bike.", 3: "Two kids play in the water."}
POOR = {1: "A man on a bike.", 2: "A dog.", 3: "A man on a bike."}


def write_results(path: Path, captions: dict[int, str]) -> Path:
    path.write_text(json.dumps([{"image_id": one, "caption": caption} for one, caption in captions.items()]))
    return path


def write_references(path: Path) -> Path:
    annotations = [{"image_id": one, "caption": text} for one, captions in REFERENCES.items() for text in captions]
    path.write_text(json.dumps({"images": [{"id": one} for one in [*REFERENCES, 5]], "annotations": annotations}))
    return path


def gridcap(*words: Any) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@with_java
def test_scores_of_files_are_those_of_coco_caption(tmp_path: Path) -> None:
    hypotheses = write_results(tmp_path / "results.json", GOOD)
    references = write_references(tmp_path / "annotations.json")
    found = json.loads(gridcap("score", hypotheses, references, "--no-meteor", "--json"))
    wanted = {one: [{"caption": text} for text in REFERENCES[one]] for one in GOOD}
    gts = PTBTokenizer().tokenize(wanted)
    res = PTBTokenizer().tokenize({one: [{"caption": text}] for one, text in GOOD.items()})
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [found[f"BLEU-{order}"] for order in range(1, 5)] == pytest.approx(bleu, abs=2e-6)
    assert found["CIDEr-D"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-6)
    assert found["ROUGE-L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-6)
    assert (found["images"], found["images_with_references"]) == (3, 4)
    assert any(line.startswith("tokens: ptb") for line in found["protocol"]["BLEU-4"])


def test_a_table_says_what_was_scored_and_how(tmp_path: Path) -> None:
    hypotheses = write_results(tmp_path / "results.json", GOOD)
    references = write_references(tmp_path / "annotations.json")
    flags = (
        "--tokenizer",
        "spacy",
        "--no-meteor",
        "--bootstrap-samples",
        200,
        "--seed",
        3,
        "--out",
        tmp_path / "scores.json",
    )
    lines = gridcap("score", hypotheses, references, *flags).splitlines()
    assert lines[0] == f"{hypotheses} against {references}: 3 images scored of 4"
    assert lines[1:3] == [
        "tokens: plain, spacy.blank('en'), lower-cased, punctuation dropped",
        "references: 2 to 4 an image",
    ]
    assert "200 resamples, seed 3; document frequencies stay" in lines[3]
    scores = json.loads((tmp_path / "scores.json").read_text())
    low, high = scores["intervals"]["CIDEr-D"]
    assert low < scores["CIDEr-D"] < high
    assert f"CIDEr-D    {scores['CIDEr-D']:.4f}   {low:.4f} to {high:.4f}" in lines
    assert "METEOR   not asked for" in lines


def test_a_difference_is_told_from_noise(tmp_path: Path) -> None:
    many = {10 * copy + one: text for copy in range(20) for one, text in GOOD.items()}
    poor = {10 * copy + one: text for copy in range(20) for one, text in POOR.items()}
    nearly = many | {1: "A dog runs on the grass."} | {12: "A man on a bike"}
    annotations = [
        {"image_id": 10 * copy + one, "caption": text}
        for copy in range(20)
        for one, captions in REFERENCES.items()
        for text in captions
    ]
    references = tmp_path / "annotations.json"
    references.write_text(json.dumps({"annotations": annotations}))

    def verdicts(first: dict[int, str], second: dict[int, str]) -> dict[str, str]:
        a, b = write_results(tmp_path / "a.json", first), write_results(tmp_path / "b.json", second)
        output = gridcap("compare", a, b, "--references", references, "--no-meteor")
        rows = [line for line in output.splitlines() if line.startswith(("BLEU", "ROUGE", "CIDEr"))]
        return {row.split()[0]: row.rsplit("  ", 1)[1] for row in rows}

    noise = "noise: the interval includes 0"
    assert set(verdicts(many, poor).values()) == {"A is better"}
    assert set(verdicts(poor, many).values()) == {"B is better"}
    assert set(verdicts(many, many).values()) == {noise}
    assert verdicts(many, nearly)["CIDEr-D"] == noise


def test_images_in_one_file_alone_are_left_out_and_counted(tmp_path: Path) -> None:
    references = write_references(tmp_path / "annotations.json")
    first = write_results(tmp_path / "a.json", GOOD)
    second = write_results(tmp_path / "b.json", {**{one: POOR[one] for one in (1, 2)}, 4: "food"})
    output = gridcap("compare", first, second, "--references", references, "--no-meteor")
    assert "2 images that both caption; 2 more are in one file alone and left out" in output
    write_results(second, {4: "food"})
    with pytest.raises(UserError, match="caption no image that is in both"):
        gridcap("compare", first, second, "--references", references)


@pytest.mark.parametrize("command", ["score", "compare"])
def test_without_java_ptb_is_an_error_that_names_plain(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    hypotheses, references = write_results(tmp_path / "a.json", GOOD), write_references(tmp_path / "r.json")
    monkeypatch.setenv("PATH", str(tmp_path))
    words = (hypotheses, references) if command == "score" else (hypotheses, hypotheses, "--references", references)
    with pytest.raises(UserError, match=r"ptb cannot be followed: there is no java .* choose the protocol plain"):
        gridcap(command, *words, "--tokenizer", "ptb")
    output = gridcap(command, *words, "--tokenizer", "spacy", "--spice")
    assert "METEOR   there is no java on the PATH" in output
    assert "SPICE    SPICE lacks stanford-corenlp" in output


@pytest.mark.parametrize("command", ["score", "compare"])
def test_a_file_that_cannot_be_written_is_an_error_that_names_it_below_the_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    hypotheses, references = write_results(tmp_path / "a.json", GOOD), write_references(tmp_path / "r.json")
    out = hypotheses / "scores.json"
    words = [hypotheses, references] if command == "score" else [hypotheses, hypotheses, "--references", references]
    flags = ["--tokenizer", "spacy", "--no-meteor", "--bootstrap-samples", "100", "--out", out]
    monkeypatch.setattr(sys, "argv", ["gridcap", command, *map(str, words + flags)])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr()
    assert re.search(rf"^error: {out}: cannot be written \(.*\); name another file", told.err)
    assert "CIDEr-D" in told.out
    assert json.loads(hypotheses.read_text())


@pytest.mark.parametrize("command", ["score", "compare"])
def test_a_seed_below_zero_is_refused(tmp_path: Path, command: str) -> None:
    path = write_results(tmp_path / "a.json", GOOD)
    result = CliRunner().invoke(app, [command, str(path), str(path), "--seed", "-1"])
    assert result.exit_code == 2
    assert "--seed" in result.output
