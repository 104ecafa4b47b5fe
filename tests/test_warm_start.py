"""Initial weights from a model folder: words by spelling, refused models, and training that resumes to the bit."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.captions.vocabulary import SPECIALS, START, UNK, VOCABULARY_FILE, Vocabulary, read_vocabulary
from pipeline.decoder.decoder import Decoder, DecoderKind
from pipeline.decoder.model_io import WEIGHTS_FILE, read_model, record_provenance
from pipeline.decoder.registry import build_decoder
from pipeline.errors import UserError
from pipeline.features.store import EncoderSpec
from pipeline.training.train import run_fingerprint
from pipeline.training.trainer import TrainParams
from pipeline.training.warm_start import initial_weights
from tests.command_line import torchrun
from tests.factories import decoder_params, train_params
from tests.kinds import all_kinds, all_kinds_exhaustively
from tests.model_folders import SIZES, make_model
from tests.model_folders import SPEC as MODEL_SPEC
from tests.test_train import PARAMS_YAML, interrupt_in_epoch_3, stage_command
from tests.tiny_dataset import EVERY_FEATURE, SPEC, make_trainer, paths_of, read_files, take_steps, train_tiny

WORDS = "a dog runs fast"
VOCABULARY = Vocabulary((*SPECIALS, "fast", "cat", "a", "zebra", "dog"))
"""Two new words, one dropped, and the others in another order."""
SHARED = ["a", "dog", "fast"]


def params_of(folder: Path, kind: DecoderKind = "soft_attention", **changes: Any) -> TrainParams:
    """Return params of a run that starts from a model of `make_model`."""
    return train_params(**({"decoder": replace(SIZES, kind=kind), "start_from": folder} | changes))


def start(folder: Path, params: TrainParams, spec: EncoderSpec = MODEL_SPEC) -> Decoder:
    """Build a decoder of `VOCABULARY` with the initial weights of a model."""
    weights, _ = initial_weights(folder, params, VOCABULARY, spec)
    decoder = build_decoder(params.decoder, spec.grid, spec.channels, len(VOCABULARY))
    decoder.load_state_dict(weights)
    return decoder.eval()


@all_kinds
def test_shared_words_get_the_logits_of_the_model(tmp_path: Path, kind: DecoderKind) -> None:
    params = params_of(tmp_path, kind)
    model = read_model(make_model(tmp_path, 1, WORDS, params=params.decoder))
    decoder = start(tmp_path, params)
    grids = torch.rand(2, 6, 5)
    words = ["<start>", "a", "dog", "<unk>", "fast", "dog"]
    logits = []
    for network, vocabulary in ((model.decoder, model.vocabulary), (decoder, VOCABULARY)):
        tokens = torch.tensor([vocabulary.words.index(word) for word in words]).expand(2, 1, -1)
        output, _ = network(grids, tokens)
        logits.append(output[..., [vocabulary.words.index(word) for word in (*SPECIALS, *SHARED)]])
    torch.testing.assert_close(logits[1], logits[0])


@all_kinds
def test_a_new_word_is_the_mean_word_of_the_model(tmp_path: Path, kind: DecoderKind) -> None:
    params = params_of(tmp_path, kind)
    model = read_model(make_model(tmp_path, 1, WORDS, params=params.decoder))
    decoder = start(tmp_path, params)
    embedding = model.decoder.embedding.weight[UNK:].mean(dim=0)
    for word in ("cat", "zebra"):
        torch.testing.assert_close(decoder.embedding.weight[VOCABULARY.words.index(word)], embedding)
    tokens = torch.tensor([[[START, START]]]).expand(2, 1, 2)
    grids = torch.rand(2, 6, 5)
    before, after = model.decoder(grids, tokens)[0], decoder(grids, tokens)[0]
    cat = after[..., VOCABULARY.words.index("cat")]
    torch.testing.assert_close(cat, before[..., UNK:].mean(dim=-1))
    assert (cat.exp() <= before[..., UNK:].exp().mean(dim=-1) + 1e-6).all()


def test_words_are_counted_and_provenance_is_kept(tmp_path: Path) -> None:
    record_provenance(make_model(tmp_path, 1, WORDS), "data/flickr8k", "resnet.pth")
    _, warm_start = initial_weights(tmp_path, params_of(tmp_path), VOCABULARY, MODEL_SPEC)
    assert (warm_start.fingerprint, warm_start.dataset, warm_start.encoder_weights) == (
        "run 1",
        "data/flickr8k",
        "resnet.pth",
    )
    assert warm_start.summary == "3 words kept, 2 new, 1 dropped, same encoder"
    assert warm_start.warm_start is None


def test_a_model_without_words_and_one_without_shared_words_are_finite(tmp_path: Path) -> None:
    for words in ("", "other words"):
        make_model(tmp_path / words, 1, words)
        weights, warm_start = initial_weights(tmp_path / words, params_of(tmp_path), VOCABULARY, MODEL_SPEC)
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert (warm_start.num_kept_words, warm_start.num_new_words) == (0, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("kind", "top_down"), ("embedding_size", 9), ("hidden_size", 9), ("attention_size", 9), ("non_local_size", 9)],
)
def test_another_kind_or_size_is_an_error(tmp_path: Path, name: str, value: Any) -> None:
    make_model(tmp_path, 1)
    params = params_of(tmp_path, decoder=replace(SIZES, **{name: value}))
    with pytest.raises(UserError) as caught:
        initial_weights(tmp_path, params, VOCABULARY, MODEL_SPEC)
    expected = f"{tmp_path}/config.json: decoder.{name} is {getattr(SIZES, name)}, but train.decoder.{name} is {value}."
    assert str(caught.value).startswith(f"{expected} Change train.decoder")


def test_another_dropout_is_not_an_error(tmp_path: Path) -> None:
    make_model(tmp_path, 1)
    start(tmp_path, params_of(tmp_path, decoder=replace(SIZES, dropout=0.5)))


@pytest.mark.parametrize("changes", [{"channels": 7}, {"grid_height": 1}, {"weights_digest": "1" * 64}])
def test_another_encoder_is_an_error_unless_grids_are_adapted(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_model(tmp_path, 1)
    spec = replace(MODEL_SPEC, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(UserError) as caught:
        start(tmp_path, params_of(tmp_path), spec)
    expected = f"encoder.{name} is {getattr(MODEL_SPEC, name)}, but that of the features is {value}."
    assert f"{tmp_path}/config.json: {expected}" in str(caught.value)
    assert "set train.start_from_grids to adapt" in str(caught.value)
    start(tmp_path, params_of(tmp_path, start_from_grids="adapt"), spec)


@all_kinds
def test_adapted_grids_get_a_new_input_projection_and_all_else_is_kept(tmp_path: Path, kind: DecoderKind) -> None:
    params = params_of(tmp_path, kind, start_from_grids="adapt")
    model = read_model(make_model(tmp_path, 1, "fast cat a zebra dog", params=params.decoder))
    spec = replace(MODEL_SPEC, channels=7)
    weights, warm_start = initial_weights(tmp_path, params, VOCABULARY, spec)
    assert warm_start.new_input_projection
    torch.manual_seed(params.seed)
    random = build_decoder(params.decoder, spec.grid, spec.channels, len(VOCABULARY)).state_dict()
    same_words = build_decoder(params.decoder, spec.grid, MODEL_SPEC.channels, len(VOCABULARY)).state_dict()
    reading = {name for name, tensor in random.items() if tensor.shape != same_words[name].shape}
    assert reading
    for name, tensor in weights.items():
        expected = random if name in reading else model.decoder.state_dict()
        assert torch.equal(tensor, expected[name]), name


def tiny_model(folder: Path, kind: DecoderKind = "soft_attention") -> Path:
    """Write a model for the small dataset (tests/tiny_dataset.py), with some of its words."""
    return make_model(folder, 1, "a red thing once", spec=SPEC, params=decoder_params(kind=kind))


@pytest.mark.slow
@all_kinds_exhaustively
def test_a_run_stopped_after_every_step_resumes_to_the_same_bytes(
    data: Path, tmp_path: Path, kind: DecoderKind
) -> None:
    dropout = {"dropout": 0.2, "region_dropout": 0.1, "word_dropout": 0.1}
    decoder = decoder_params(kind=kind, **dropout)
    params = replace(EVERY_FEATURE, decoder=decoder, start_from=tiny_model(tmp_path / "model", kind))
    (tmp_path / "0").mkdir()
    expected = read_files(train_tiny(data, tmp_path / "0" / "run", params))
    for stop in range(1, 3 * params.max_epochs):
        folder = tmp_path / str(stop) / "run"
        folder.mkdir(parents=True)
        take_steps(make_trainer(data, folder, params), stop)
        torch.manual_seed(999)
        assert read_files(train_tiny(data, folder, params)) == expected


def test_training_starts_from_the_weights_and_records_them(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = train_params(max_epochs=1, decoder=decoder_params(), start_from=tiny_model(tmp_path / "model"))
    trainer = make_trainer(data, tmp_path, params)
    vocabulary = read_vocabulary(data / "tokens" / VOCABULARY_FILE)
    expected, warm_start = initial_weights(tmp_path / "model", params, vocabulary, SPEC)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trainer.decoder.state_dict().items())
    with caplog.at_level("INFO", logger="gridcap"):
        config = read_model(train_tiny(data, tmp_path / "run", params)).config
    assert config.warm_start == warm_start
    (line,) = [message for message in caplog.messages if "initial weights" in message]
    assert line == f"train: initial weights of {tmp_path}/model, training run run 1: {warm_start.summary}"
    assert re.fullmatch(r"3 words kept, \d new, 1 dropped, same encoder", warm_start.summary)
    again = replace(params, start_from=make_next(data, tmp_path, params))
    assert read_model(train_tiny(data, tmp_path / "again", again)).config.warm_start == replace(
        warm_start, fingerprint="next", num_kept_words=len(vocabulary) - 4, num_new_words=0, num_dropped_words=0,
        warm_start=warm_start,
    )  # fmt: skip


def make_next(data: Path, folder: Path, params: TrainParams) -> Path:
    """Train a model in a folder `next`, whose name becomes its fingerprint."""
    return train_tiny(data, folder / "next", params)


def test_the_fingerprint_depends_on_the_content_of_the_model_and_not_on_its_path(data: Path, tmp_path: Path) -> None:
    paths = paths_of(data, tmp_path)
    model = make_model(tmp_path / "model", 1)
    copy = shutil.copytree(model, tmp_path / "copy")
    name = run_fingerprint(params_of(model), paths, 1)
    assert run_fingerprint(params_of(copy), paths, 1) == name
    changed = {
        run_fingerprint(params_of(make_model(tmp_path / "other", 2)), paths, 1),
        run_fingerprint(params_of(model, start_from=None), paths, 1),
        run_fingerprint(params_of(model, start_from_grids="adapt"), paths, 1),
    }
    assert len(changed | {name}) == 4


def test_a_missing_or_damaged_model_is_an_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path}/absent/config.json: no such file"):
        run_fingerprint(params_of(tmp_path / "absent"), paths_of(data, tmp_path), 1)
    weights = tiny_model(tmp_path / "model") / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    params = train_params(decoder=decoder_params(), start_from=weights.parent)
    with pytest.raises(UserError, match=f"^{weights}: SHA-256 differs"):
        train_tiny(data, tmp_path / "run", params)


def start_params(data: Path, folder: Path) -> str:
    """Return the params of a stage that starts from a model."""
    model = tiny_model(folder / "model")
    return PARAMS_YAML.replace("start_from: null", f"start_from: {model}").replace("epochs: 7", "epochs: 5")


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_bytes_and_tells_its_initial_weights_once(
    data: Path, tmp_path: Path
) -> None:
    text = start_params(data, tmp_path)
    uninterrupted = stage_command(data, tmp_path / "uninterrupted", tmp_path / "work-uninterrupted", text)
    result = subprocess.run(uninterrupted, check=True, capture_output=True, text=True)
    assert result.stderr.count("initial weights of") == 1
    command = stage_command(data, tmp_path / "out", tmp_path / "work", text)
    interrupt_in_epoch_3(command, lambda pid: os.kill(pid, 9))
    resumed = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "resuming from" in resumed.stderr
    assert "initial weights of" not in resumed.stderr
    assert read_files(tmp_path / "out") == read_files(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_two_processes_start_from_the_weights_of_one(data: Path, tmp_path: Path) -> None:
    text = start_params(data, tmp_path)
    for old in ("dropout: 0.2", "dropout: 0.1", "scheduled_sampling: 0.2"):
        text = text.replace(old, f"{old.partition(':')[0]}: 0.0")
    one = stage_command(data, tmp_path / "one", tmp_path / "work-one", text)
    two = stage_command(data, tmp_path / "two", tmp_path / "work-two", text)
    subprocess.run(one, check=True, capture_output=True)
    launch = torchrun(two, tmp_path / "logs")
    result = subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("initial weights of") == 1
    models = [read_model(tmp_path / name) for name in ("one", "two")]
    assert models[0].config.warm_start == models[1].config.warm_start
    for name, tensor in models[0].decoder.state_dict().items():
        torch.testing.assert_close(models[1].decoder.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)
