"""Scores of caption files, by `gridcap score` and `gridcap compare`."""

import json
import sys
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from pipeline.cli import main
from pipeline.errors import UserError
from tests.command_line import gridcap
from tests.java_programs import needs_java

pytestmark = pytest.mark.slow  # spaCy is slow to import

REFERENCES = {
    1: ["A dog runs on the grass.", "A brown dog is running (fast) over grass!", "Dogs can't fly."],
    2: ["A man rides a red bike.", "a man on a bike"],
    3: ["Two children play in the water.", "Kids play in a pool.", "Two kids in the water, playing.", "Water."],
    4: ["A plate of food."],
}
GOOD = {1: "A dog runs over the grass.", 2: "A man rides a bike.", 3: "Two kids play in the water."}
POOR = {1: "A man on a bike.", 2: "A dog.", 3: "A man on a bike."}


def write_results(path: Path, captions: dict[int, str]) -> Path:
    path.write_text(json.dumps([{"image_id": image_id, "caption": text} for image_id, text in captions.items()]))
    return path


def write_references(path: Path, references: dict[int, list[str]] = REFERENCES) -> Path:
    annotations = [{"image_id": image_id, "caption": text} for image_id, texts in references.items() for text in texts]
    # Image 5 has no caption.
    images = [{"id": image_id} for image_id in [*references, 5]]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def run(*arguments: object) -> str:
    """Run `gridcap`; raise its error or return its output."""
    result = gridcap(*arguments)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@needs_java
def test_scores_equal_those_of_coco_caption(tmp_path: Path) -> None:
    hypotheses = write_results(tmp_path / "results.json", GOOD)
    references = write_references(tmp_path / "annotations.json")
    scores = json.loads(run("score", hypotheses, references, "--tokenizer", "ptb", "--no-meteor", "--json"))
    gts = PTBTokenizer().tokenize({image_id: [{"caption": text} for text in REFERENCES[image_id]] for image_id in GOOD})
    res = PTBTokenizer().tokenize({image_id: [{"caption": text}] for image_id, text in GOOD.items()})
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    assert [scores[f"BLEU-{order}"] for order in range(1, 5)] == pytest.approx(bleu, abs=2e-6)
    assert scores["CIDEr-D"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-6)
    assert scores["ROUGE-L"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-6)
    assert (scores["num_images"], scores["num_images_with_references"]) == (3, 4)
    assert scores["signature"]["BLEU-4"][0].startswith("BLEU-4|refs:2-4|tok:ptb-3.4.1|lang:en|case:lower|punct:drop|")


def test_the_table_has_scores_intervals_protocol_and_signatures(tmp_path: Path) -> None:
    hypotheses = write_results(tmp_path / "results.json", GOOD)
    references = write_references(tmp_path / "annotations.json")
    out = tmp_path / "scores.json"
    flags = ("--no-meteor", "--bootstrap-samples", 200, "--seed", 3, "--out", out)
    lines = run("score", hypotheses, references, "--tokenizer", "spacy", *flags).splitlines()
    assert lines[0] == f"hypotheses: {hypotheses}, 3 images"
    assert lines[1] == f"references: {references}, 4 images"
    assert lines[2].startswith("tokenizer: spacy 3.")
    assert lines[3] == "references per image: 2 to 4"
    assert "200 samples, seed 3" in lines[4]
    scores = json.loads(out.read_text())
    low, high = scores["intervals"]["CIDEr-D"]
    assert low < scores["CIDEr-D"] < high
    assert f"CIDEr-D    {scores['CIDEr-D']:.4f}   {low:.4f} to {high:.4f}" in lines
    assert "METEOR   disabled" in lines
    for (signature,) in scores["signature"].values():
        assert f"  {signature}" in lines


def test_compare_finds_significant_differences(tmp_path: Path) -> None:
    copies = range(0, 200, 10)
    references = write_references(
        tmp_path / "annotations.json",
        {copy + image_id: texts for copy in copies for image_id, texts in REFERENCES.items()},
    )
    good = {copy + image_id: text for copy in copies for image_id, text in GOOD.items()}
    poor = {copy + image_id: text for copy in copies for image_id, text in POOR.items()}
    similar = good | {1: "A dog runs on the grass.", 12: "A man on a bike"}

    def verdicts(first: dict[int, str], second: dict[int, str]) -> dict[str, str]:
        a, b = write_results(tmp_path / "a.json", first), write_results(tmp_path / "b.json", second)
        output = run("compare", a, b, "--references", references, "--tokenizer", "spacy", "--no-meteor")
        rows = [line for line in output.splitlines() if line.startswith(("BLEU", "ROUGE", "CIDEr"))]
        return {row.split()[0]: row.rsplit("  ", 1)[1] for row in rows}

    assert set(verdicts(good, poor).values()) == {"A is better"}
    assert set(verdicts(poor, good).values()) == {"B is better"}
    assert set(verdicts(good, good).values()) == {"not significant"}
    assert verdicts(good, similar)["CIDEr-D"] == "not significant"


def test_compare_prints_signatures(tmp_path: Path) -> None:
    hypotheses = write_results(tmp_path / "a.json", GOOD)
    references = write_references(tmp_path / "r.json")
    output = run("compare", hypotheses, hypotheses, "--references", references, "--no-meteor")
    assert "\n  CIDEr-D|refs:2-4|tok:spacy-3." in output


def test_compare_leaves_out_and_counts_images_in_only_one_file(tmp_path: Path) -> None:
    references = write_references(tmp_path / "annotations.json")
    first = write_results(tmp_path / "a.json", GOOD)
    second = write_results(tmp_path / "b.json", {1: POOR[1], 2: POOR[2], 4: "food"})
    output = run("compare", first, second, "--references", references, "--no-meteor")
    assert "2 images in both files; 2 images in only one file are left out" in output
    write_results(second, {4: "food"})
    with pytest.raises(UserError, match=f"{first}: no image in common with {second}"):
        run("compare", first, second, "--references", references)


@pytest.mark.parametrize("command", ["score", "compare"])
def test_without_java_ptb_is_an_error_and_meteor_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    hypotheses, references = write_results(tmp_path / "a.json", GOOD), write_references(tmp_path / "r.json")
    monkeypatch.setenv("PATH", str(tmp_path))
    paths = (hypotheses, references) if command == "score" else (hypotheses, hypotheses, "--references", references)
    with pytest.raises(UserError, match=r"ptb.*java.*spacy"):
        run(command, *paths, "--tokenizer", "ptb")
    lines = run(command, *paths, "--tokenizer", "spacy", "--spice").splitlines()
    assert any(line.startswith("METEOR   java is not on the PATH") for line in lines)
    assert any(line.startswith("SPICE ") and "stanford-corenlp" in line for line in lines)


@pytest.mark.parametrize("command", ["score", "compare"])
def test_an_unwritable_file_is_an_error_after_the_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    hypotheses, references = write_results(tmp_path / "a.json", GOOD), write_references(tmp_path / "r.json")
    out = hypotheses / "scores.json"
    paths = [hypotheses, references] if command == "score" else [hypotheses, hypotheses, "--references", references]
    flags = ["--tokenizer", "spacy", "--no-meteor", "--bootstrap-samples", "100", "--out", out]
    monkeypatch.setattr(sys, "argv", ["gridcap", command, *map(str, paths + flags)])
    with pytest.raises(SystemExit, match="2"):
        main()
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {out}: ")
    assert "CIDEr-D" in captured.out
    assert json.loads(hypotheses.read_text())


@pytest.mark.parametrize("command", ["score", "compare"])
def test_a_negative_seed_is_rejected(tmp_path: Path, command: str) -> None:
    path = write_results(tmp_path / "a.json", GOOD)
    result = gridcap(command, path, path, "--seed", -1)
    assert result.exit_code == 2
    assert "--seed" in result.output


def test_one_image_has_no_cider_and_no_intervals(tmp_path: Path) -> None:
    hypotheses, references = write_results(tmp_path / "a.json", {1: GOOD[1]}), write_references(tmp_path / "r.json")
    out = tmp_path / "scores.json"
    lines = run("score", hypotheses, references, "--no-meteor", "--out", out).splitlines()
    assert "CIDEr-D  not defined for one image" in lines
    assert "intervals: not defined for one image" in lines
    scores = json.loads(out.read_text())
    assert "CIDEr-D" not in scores
    assert scores["intervals"] == {}
    assert 0 < scores["BLEU-4"] < 1
    lines = run("compare", hypotheses, hypotheses, "--references", references, "--no-meteor").splitlines()
    assert any(line.startswith("BLEU-4 ") and line.endswith("none  not testable") for line in lines)
    assert "CIDEr    not defined for one image" in lines
