import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from pipeline.artifacts import file_digest
from pipeline.errors import UserError
from pipeline.features.encoder import encode_grids, load_encoder
from pipeline.features.images import normalize
from pipeline.params import load
from pipeline.scenes.dataset import RenderParams
from pipeline.scenes.encoder_training import (
    LAYER,
    STRIDE,
    Lessons,
    Pupil,
    SceneEncoderParams,
    caption_loss,
    stack,
    teach,
    train_scene_encoder,
    write_weights,
)
from pipeline.scenes.examples import (
    ATTRIBUTES,
    NOTHING,
    UNCOUNTED,
    Syllabus,
    center_cell,
    classes_of,
    draw_lesson,
    draw_lessons,
)
from pipeline.scenes.scene import COLORS, SHAPES
from tests.factories import encode_params

ROOT = Path(__file__).parents[1]
SCENES = ROOT / "data" / "scenes"
HELD_OUT = (("red", "sphere"), ("blue", "cube"))
SYLLABUS = Syllabus(seed=3, size=64, stride=STRIDE, held_out=HELD_OUT)
PARAMS = SceneEncoderParams(
    seed=5,
    train=24,
    test=4,
    lessons_a_batch=4,
    max_epochs=2,
    peak_lr=2e-3,
    warmup_fraction=0.2,
    weight_decay=0.05,
    background_weight=0.3,
    brightness_jitter=0.1,
)


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    return stack([draw_lesson(SYLLABUS, "train", index) for index in range(PARAMS.train)], HELD_OUT)


@pytest.fixture
def quick_and_exact():
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(exact)
    torch.set_num_threads(threads)


def test_train_lessons_never_show_a_held_out_pair_and_every_second_test_lesson_does():
    def shows(purpose, index) -> bool:
        bodies = draw_lesson(SYLLABUS, purpose, index).scene.bodies
        return any((body.color, body.shape) in HELD_OUT for body in bodies)

    assert not any(shows("train", index) for index in range(40))
    assert [shows("test", index) for index in range(8)] == [False, True] * 4


def test_cells_are_told_the_body_in_front_of_them():
    syllabus = replace(SYLLABUS, size=128)
    for index in range(12):
        lesson = draw_lesson(syllabus, "train", index)
        bodies = sorted(zip(lesson.scene.bodies, lesson.boxes, strict=True), key=lambda pair: pair[0].z)
        nearest, box = bodies[0]
        assert lesson.classes[(slice(None), *center_cell(box, STRIDE))].tolist() == classes_of(nearest)
        # The wall above the horizon is behind everything.
        assert (lesson.classes[:, 0] == NOTHING).all()
        by_attribute = [set(lesson.classes[i].flat) - {NOTHING, UNCOUNTED} for i in range(len(ATTRIBUTES))]
        shown = [set(values) for values in zip(*(classes_of(body) for body, _ in bodies), strict=True)]
        assert by_attribute == shown


def test_lessons_do_not_depend_on_the_worker():
    for index, lesson in enumerate(draw_lessons(SYLLABUS, "train", 3, workers=2)):
        again = draw_lesson(SYLLABUS, "train", index)
        assert np.array_equal(lesson.picture, again.picture)
        assert np.array_equal(lesson.classes, again.classes)


def test_training_lowers_the_loss(lessons, quick_and_exact, tmp_path):
    pupil = teach(PARAMS, lessons, tmp_path / "checkpoint")
    torch.manual_seed(PARAMS.seed)
    untaught = Pupil()
    before, after = (
        caption_loss(
            one.train(),
            normalize(lessons.pictures),
            lessons.classes,
            lessons.floors,
            lessons.unseen,
            PARAMS.background_weight,
        ).item()
        for one in (untaught, pupil)
    )
    assert after < 0.75 * before


def test_training_gives_the_same_file_twice(lessons, quick_and_exact, tmp_path):
    for name in ("first", "second"):
        write_weights(teach(PARAMS, lessons, tmp_path / f"{name}.checkpoint").encoder, tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_training_goes_on_after_a_kill_to_the_same_weights(lessons, quick_and_exact, tmp_path):
    params = replace(PARAMS, max_epochs=6)
    straight = teach(params, lessons, tmp_path / "straight").state_dict()
    safetensors.torch.save_file(vars(lessons), tmp_path / "lessons")
    child = subprocess.Popen(
        [sys.executable, "-c", TEACH, repr(params), tmp_path / "lessons", tmp_path / "killed"], cwd=ROOT
    )
    while not (tmp_path / "killed").is_file():
        assert child.poll() is None
        time.sleep(0.005)
    child.kill()
    child.wait()

    done = torch.load(tmp_path / "killed", weights_only=True)["epochs"]
    assert 1 <= done < params.max_epochs
    resumed = teach(params, lessons, tmp_path / "killed").state_dict()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


TEACH = """
import sys
from pathlib import Path
import safetensors.torch
import torch
from pipeline.scenes.encoder_training import Lessons, SceneEncoderParams, teach
from tests.factories import encode_params
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
teach(eval(sys.argv[1]), Lessons(**safetensors.torch.load_file(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_held_out_pair_is_neither_taught_nor_denied(lessons):
    red, sphere, cube = 1 + COLORS.index("red"), 1 + SHAPES.index("sphere"), 1 + SHAPES.index("cube")
    classes = torch.full((1, len(ATTRIBUTES), 4, 4), UNCOUNTED, dtype=torch.int8)
    classes[0, :, 2, 2] = torch.tensor([cube, red, 1, 1])
    pupil = Pupil()
    images = normalize(lessons.pictures[:1])
    caption_loss(pupil, images, classes, lessons.floors[:1], lessons.unseen, 0.3).backward()
    pull = pupil.cells.bias.grad[: 1 + len(SHAPES)]
    assert pull[sphere] == 0
    assert (pull[[place for place in range(len(pull)) if place != sphere]] != 0).all()


def test_a_loss_that_is_not_finite_names_the_knob(lessons, tmp_path):
    with pytest.raises(UserError, match=r"not finite in epoch 1, step \d+; lower encoder.peak_lr"):
        teach(replace(PARAMS, peak_lr=1e30, warmup_fraction=0.0), lessons, tmp_path / "checkpoint")


def test_pictures_must_divide_into_cells(tmp_path):
    render = RenderParams(seed=1, size=72, train=1, val=1, test=1, alike=0.3, held_out=HELD_OUT)
    with pytest.raises(UserError, match=r"render.size must be a multiple of 16 for the encoder, got 72"):
        train_scene_encoder(PARAMS, render, tmp_path / "work", tmp_path / "out", workers=1)


def test_the_whole_run_publishes_weights_that_load(tmp_path):
    render = RenderParams(seed=1, size=64, train=1, val=1, test=1, alike=0.3, held_out=HELD_OUT)
    out = tmp_path / "encoder.safetensors"
    figures = train_scene_encoder(replace(PARAMS, max_epochs=1), render, tmp_path / "work", out, workers=1)
    assert figures["weights"] == file_digest(out)
    assert figures["bodies"]["held_out"]["count"] >= 2
    assert encoder_of(out, 64).channels == 256


def test_the_shipped_encoder_is_small_and_its_features_tell_shape_and_color():
    path = SCENES / "encoder.safetensors"
    assert path.stat().st_size <= 6_000_000
    render = load(SCENES / "params.yaml", "render", RenderParams)
    # A seed of its own, so that the encoder was not trained on these scenes.
    syllabus = Syllabus(seed=987, size=render.size, stride=STRIDE, held_out=render.held_out)
    encoder = encoder_of(path, render.size)
    features, classes = read_cells(encoder, syllabus, "train", 150, at_centers=False)
    seen, wanted = read_cells(encoder, syllabus, "test", 30, at_centers=True)
    for column, attribute in enumerate(ATTRIBUTES):
        if attribute in ("shape", "color"):
            answers = seen @ ridge_probe(features, classes[:, column])
            assert (answers.argmax(axis=1) == wanted[:, column]).mean() >= 0.9, attribute


def test_the_shipped_figures_are_those_of_the_shipped_file():
    figures = json.loads((SCENES / "encoder.json").read_text(encoding="utf-8"))
    assert figures["weights"] == file_digest(SCENES / "encoder.safetensors")
    assert figures["bodies"]["seen"]["shape_and_color"] >= 0.95


def encoder_of(path, size):
    return load_encoder(encode_params(path, layer=LAYER, image_size=size))


def read_cells(encoder, syllabus, purpose, count, *, at_centers):
    """Features [cells, 257], the last of them 1, and classes [cells, A] of cells with a body."""
    features, classes = [], []
    lessons = [draw_lesson(syllabus, purpose, index) for index in range(count)]
    grids = encode_grids(encoder, np.stack([lesson.picture for lesson in lessons]))
    for lesson, grid in zip(lessons, grids, strict=True):
        side = lesson.classes.shape[-1]
        if at_centers:
            cells = [center_cell(box, STRIDE) for box in lesson.boxes]
            classes += [classes_of(body) for body in lesson.scene.bodies]
        else:
            cells = list(zip(*np.nonzero(lesson.classes[0] > NOTHING), strict=True))
            classes += [lesson.classes[:, y, x] for y, x in cells]
        features += [np.append(grid[y * side + x].astype(np.float32), 1) for y, x in cells]
    return np.array(features), np.array(classes)


def ridge_probe(features, classes):
    targets = np.eye(classes.max() + 1)[classes]
    return np.linalg.solve(features.T @ features + np.eye(features.shape[1]), features.T @ targets)
