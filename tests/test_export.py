"""`gridcap export`: self-contained, verified model folders."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.decoder.decoder import DecoderKind
from pipeline.decoder.model_io import record_provenance
from pipeline.errors import UserError
from pipeline.generation.search_settings import write_search_settings
from pipeline.prediction.captioner import DEFAULT_SEARCH, Captioner
from tests.command_line import gridcap
from tests.kinds import OTHER_KINDS
from tests.solid_images import solid_image
from tests.tiny_captioner import COLORS, TRAINING, Tiny, copy_model_without_encoder
from tests.tiny_dataset import train_tiny

pytestmark = pytest.mark.slow

SCORES = {
    "num_images": 300,
    "BLEU-1": 0.8333,
    "ROUGE-L": 0.75,
    "protocol": {"BLEU-1": ["refs: 2"], "ROUGE-L": ["refs: 2"]},
    "intervals": {"BLEU-1": [0.81, 0.85]},
    "signature": {"BLEU-1": ["BLEU-1|refs:2|tok:spacy"]},
}


@pytest.fixture
def moved(tiny: Tiny, tmp_path: Path) -> Path:
    return copy_model_without_encoder(tiny, tmp_path / "clone" / "data" / "model")


def test_an_export_with_encoder_needs_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    scores, out = tmp_path / "scores.json", tmp_path / "below" / "exported"
    scores.write_text(json.dumps(SCORES))
    result = gridcap("export", tiny.model, "--out", out, "--with-encoder", "--scores", scores)
    assert result.exit_code == 0, result.output
    [line] = result.stdout.splitlines()
    assert f"gridcap predict --model {out}" in line
    record_provenance(out, "images", "nowhere.safetensors")
    assert "red" in Captioner.load(out).caption([solid_image("red")])[0].words
    weights = load_file(out / "encoder.safetensors")
    assert not any(name.startswith(("layer3", "fc")) for name in weights)
    card = (out / "model_card.md").read_text()
    for fact in ("BLEU-1 | 0.8333", "ROUGE-L | 0.75", "0.8100 to 0.8500", "BLEU-1|refs:2|tok:spacy"):
        assert fact in card


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_export_of_any_kind_captions_alone_and_in_a_mixed_ensemble(
    tiny: Tiny, tmp_path: Path, kind: DecoderKind
) -> None:
    params = replace(TRAINING, decoder=replace(TRAINING.decoder, kind=kind))
    model, out = train_tiny(tiny.folder, tmp_path / "run", params, live_steps=100), tmp_path / "ensemble" / kind
    record_provenance(model, "images", str(tiny.weights))
    result = gridcap("export", model, "--out", out, "--with-encoder")
    assert result.exit_code == 0, result.output
    assert f"| decoder | `{kind}`" in (out / "model_card.md").read_text()
    mixed = Captioner.load(tiny.model, ensemble=tmp_path / "ensemble", device="cpu")
    for captioner in (Captioner.load(out, device="cpu"), mixed):
        for color in COLORS:
            [caption] = captioner.caption([solid_image(color)])
            assert color in caption.words
            assert caption.attention is not None
            sums = caption.attention.sum(axis=(1, 2))
            assert (sums < 1.001).all()
            assert (sums > 0.999).all() == (kind != "adaptive")
    assert gridcap("predict", tiny.images / "00.png", "--model", out, "--attention", tmp_path / "a.svg").exit_code == 0
    assert ("· sentinel" in (tmp_path / "a.svg").read_text()) == (kind == "adaptive")


def test_an_export_without_encoder_copies_the_model_and_prints_what_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    result = gridcap("export", tiny.model, "--out", out)
    assert result.exit_code == 0, result.output
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "BLEU-1" not in files.pop("model_card.md").decode()
    assert files == {path.name: path.read_bytes() for path in tiny.model.iterdir()}
    _, encoder_line, card_line = result.stdout.splitlines()
    assert encoder_line.startswith(f"{out}: ")
    assert "--with-encoder" in encoder_line
    assert card_line.startswith(f"{out / 'model_card.md'}: ")
    assert "--scores" in card_line


@pytest.mark.parametrize("recorded_in", ["generated", "model"])
def test_an_export_keeps_the_search_settings_of_its_captions(tiny: Tiny, tmp_path: Path, recorded_in: str) -> None:
    shutil.copytree(tiny.model, tmp_path / "run" / "model")
    search = replace(DEFAULT_SEARCH, beam_size=2)
    fingerprint = Captioner.load(tiny.model, device="cpu").config.fingerprint
    write_search_settings(tmp_path / "run" / recorded_in, search, fingerprint)
    result = gridcap("export", tmp_path / "run" / "model", "--out", tmp_path / "elsewhere" / "exported")
    assert result.exit_code == 0, result.output
    assert Captioner.load(tmp_path / "elsewhere" / "exported", device="cpu").search == search


def test_an_existing_folder_is_not_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    result = gridcap("export", tiny.model, "--out", tmp_path)
    assert f"{tmp_path}: already exists" in str(result.exception)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("[]", "should be an object"),
        ("{}", "protocol: Field required"),
        ('{"protocol": 3}', "protocol: "),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": null}', "contains no scores"),
        ('{"protocol": {"BLEU-4": 3}, "BLEU-4": 0.5}', "protocol.BLEU-4"),
        ('{"protocol": {"BLEU-4": "words"}, "BLEU-4": 0.5}', "protocol.BLEU-4"),
        ('{"protocol": {"BLEU-4": [3]}, "BLEU-4": 0.5}', "protocol.BLEU-4"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": NaN}', "nan"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 1e999}', "inf"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 1' + "0" * 400 + "}", "finite"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 0.5, "intervals": {"BLEU-4": ["a", 3]}}', "intervals.BLEU-4"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 0.5, "intervals": 3}', "intervals"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 0.5, "signature": {"BLEU-4": 3}}', "signature.BLEU-4"),
        ('{"protocol": {"BLEU-4": []}, "BLEU-4": 0.5, "num_images": "ten"}', "num_images"),
    ],
)
def test_unusable_scores_are_errors(tiny: Tiny, tmp_path: Path, content: str, fact: str) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(content)
    result = gridcap("export", tiny.model, "--out", tmp_path / "out", "--scores", scores)
    assert isinstance(result.exception, UserError)
    for expected in (str(scores), fact, "`evaluate`"):
        assert expected in str(result.exception)
    assert not (tmp_path / "out").exists()


def damage(path: Path, content: bytes | None) -> None:
    """Replace the content of a file, or the file by a folder."""
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "Is a directory"),
        (b"", "EOF"),
        (b'[{"epoch": 1, "val_', "EOF"),
        (b"\xff\xfe[]", "Invalid JSON"),
        (b'{"epoch": 1}', "valid array"),
        (b'[{"epoch": 1, "val_loss": "low"}]', "[0].val_loss"),
        (b"[]", "has 0 epochs"),
    ],
)
def test_a_damaged_history_is_an_error(moved: Path, tmp_path: Path, content: bytes | None, fact: str) -> None:
    damage(moved / "history.json", content)
    result = gridcap("export", moved, "--out", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    for expected in (str(moved / "history.json"), fact, "model folder"):
        assert expected in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_missing_history_is_an_error(moved: Path, tmp_path: Path) -> None:
    (moved / "history.json").unlink()
    result = gridcap("export", moved, "--out", tmp_path / "out")
    assert f"{moved / 'history.json'}: no such file" in str(result.exception)


@pytest.mark.parametrize("content", [None, b"", b'{"schema": "grid'])
def test_a_damaged_vocabulary_is_an_error_about_the_model_folder(
    moved: Path, tmp_path: Path, content: bytes | None
) -> None:
    damage(moved / "vocabulary.json", content)
    for arguments in (["predict", "a.jpg", "--model", moved], ["export", moved, "--out", tmp_path / "out"]):
        result = gridcap(*arguments)
        assert isinstance(result.exception, UserError)
        assert str(moved / "vocabulary.json") in str(result.exception)
        # An exported folder has no tokens to make the vocabulary again from.
        assert "tokenize" not in str(result.exception)


def test_a_missing_vocabulary_is_an_error(moved: Path) -> None:
    (moved / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json: no such file"):
        Captioner.load(moved)


def test_a_failed_export_leaves_no_folder(moved: Path, tmp_path: Path) -> None:
    result = gridcap("export", moved, "--out", tmp_path / "out", "--with-encoder")
    assert "--encoder-weights" in str(result.exception)
    assert list(tmp_path.iterdir()) == [tmp_path / "clone"]
