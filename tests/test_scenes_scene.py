from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scenes.scene import (
    COLORS,
    FARTHEST,
    FLOORS,
    FOOTPRINT,
    FRAME_MARGIN,
    GAP,
    NEAREST,
    SHAPES,
    SPREAD,
    TEXTURES,
    Color,
    Scene,
    Shape,
    draw_scene,
)

ONE_OF_EACH_SHAPE: frozenset[tuple[Color, Shape]] = frozenset(
    {("red", "cube"), ("blue", "sphere"), ("green", "ring"), ("white", "cone"), ("black", "pyramid")}
)
SEEDS = st.integers(0, 2**32 - 1)


def drawn(
    seed: int,
    forbidden: frozenset[tuple[Color, Shape]] = frozenset(),
    required: tuple[Color, Shape] | None = None,
) -> Scene:
    return draw_scene(np.random.default_rng(seed), forbidden=forbidden, required=required, duplicate_rate=0.35)


def pairs(scene: Scene) -> list[tuple[Color, Shape]]:
    return [(body.color, body.shape) for body in scene.bodies]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [drawn(seed) for seed in range(1000)]


@given(SEEDS)
def test_bodies_stand_whole_in_the_frame_and_apart(seed: int) -> None:
    bodies = drawn(seed).bodies
    assert 1 <= len(bodies) <= 4
    for place, body in enumerate(bodies):
        assert NEAREST <= body.z <= FARTHEST
        assert abs(body.x) <= SPREAD * body.z - FRAME_MARGIN[body.size]
        assert 0 <= body.turn < 1
        for other in bodies[:place]:
            distance = np.hypot(body.x - other.x, body.z - other.z)
            assert distance >= FOOTPRINT[body.size] + FOOTPRINT[other.size] + GAP - 1e-9


@given(SEEDS)
def test_bodies_of_one_color_and_shape_are_alike(seed: int) -> None:
    bodies = drawn(seed).bodies
    looks = {(body.color, body.shape, body.size, body.texture) for body in bodies}
    assert len(looks) == len({(body.color, body.shape) for body in bodies})


@given(SEEDS)
def test_forbidden_pairs_never_occur(seed: int) -> None:
    assert not ONE_OF_EACH_SHAPE & set(pairs(drawn(seed, forbidden=ONE_OF_EACH_SHAPE)))


@given(SEEDS)
def test_the_required_pair_occurs_although_it_is_forbidden(seed: int) -> None:
    found = pairs(drawn(seed, forbidden=ONE_OF_EACH_SHAPE, required=("red", "cube")))
    assert set(found) & ONE_OF_EACH_SHAPE == {("red", "cube")}


@given(SEEDS)
def test_the_lamp_hangs_above_and_on_the_camera_side(seed: int) -> None:
    scene = drawn(seed)
    x, y, z = scene.light
    assert x * x + y * y + z * z == pytest.approx(1)
    assert y > 0 > z
    assert 2.2 <= scene.camera_height <= 3.2


def test_one_seed_gives_one_scene_and_another_seed_another() -> None:
    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_scenes_vary_as_intended(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.bodies) for scene in scenes)
    for count, share in zip((1, 2, 3, 4), (0.12, 0.33, 0.33, 0.22), strict=True):
        assert counts[count] / len(scenes) == pytest.approx(share, abs=0.05)
    repeating = [scene for scene in scenes if len(set(pairs(scene))) < len(scene.bodies)]
    assert len(repeating) / len(scenes) == pytest.approx(0.31, abs=0.05)
    assert {scene.floor for scene in scenes} == set(FLOORS)
    assert {body.texture for scene in scenes for body in scene.bodies} == set(TEXTURES)


def test_every_pair_is_drawn_about_equally_often(scenes: list[Scene]) -> None:
    seen = Counter(pair for scene in scenes for pair in set(pairs(scene)))
    assert set(seen) == {(color, shape) for color in COLORS for shape in SHAPES}
    mean = sum(seen.values()) / len(seen)
    assert min(seen.values()) > mean / 2
    assert max(seen.values()) < mean * 2
