from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scenes.scene import (
    COLORS,
    FLOORS,
    FOOTPRINT_RADIUS,
    FRAME_MARGIN,
    FRAME_SLOPE,
    MAX_Z,
    MIN_GAP,
    MIN_Z,
    SHAPES,
    TEXTURES,
    ColorShape,
    Scene,
    sample_scene,
)

FORBIDDEN: frozenset[ColorShape] = frozenset(
    {("red", "cube"), ("blue", "sphere"), ("green", "ring"), ("white", "cone"), ("black", "pyramid")}
)
SEEDS = st.integers(0, 2**32 - 1)


def sample(seed: int, forbidden: frozenset[ColorShape] = frozenset(), required: ColorShape | None = None) -> Scene:
    return sample_scene(np.random.default_rng(seed), forbidden=forbidden, required=required, duplicate_rate=0.35)


def pairs(scene: Scene) -> list[ColorShape]:
    return [(obj.color, obj.shape) for obj in scene.objects]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample(seed) for seed in range(1000)]


@given(SEEDS)
def test_objects_are_inside_the_frame_and_apart(seed: int) -> None:
    objects = sample(seed).objects
    assert 1 <= len(objects) <= 4
    for index, obj in enumerate(objects):
        assert MIN_Z <= obj.z <= MAX_Z
        assert abs(obj.x) <= FRAME_SLOPE * obj.z - FRAME_MARGIN[obj.size]
        assert 0 <= obj.yaw < 1
        for other in objects[:index]:
            distance = np.hypot(obj.x - other.x, obj.z - other.z)
            assert distance >= FOOTPRINT_RADIUS[obj.size] + FOOTPRINT_RADIUS[other.size] + MIN_GAP - 1e-9


@given(SEEDS)
def test_objects_of_one_color_and_shape_are_identical(seed: int) -> None:
    objects = sample(seed).objects
    appearances = {(obj.color, obj.shape, obj.size, obj.texture) for obj in objects}
    assert len(appearances) == len({(obj.color, obj.shape) for obj in objects})


@given(SEEDS)
def test_forbidden_pairs_never_occur(seed: int) -> None:
    assert not FORBIDDEN & set(pairs(sample(seed, forbidden=FORBIDDEN)))


@given(SEEDS)
def test_the_required_pair_occurs_even_if_forbidden(seed: int) -> None:
    scene = sample(seed, forbidden=FORBIDDEN, required=("red", "cube"))
    assert set(pairs(scene)) & FORBIDDEN == {("red", "cube")}


@given(SEEDS)
def test_the_light_is_above_the_floor_and_on_the_side_of_the_camera(seed: int) -> None:
    scene = sample(seed)
    x, y, z = scene.light_direction
    assert x * x + y * y + z * z == pytest.approx(1)
    assert y > 0 > z
    assert 2.2 <= scene.camera_height <= 3.2


def test_the_scene_is_determined_by_the_seed() -> None:
    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_scenes_follow_the_configured_distribution(scenes: list[Scene]) -> None:
    counts = Counter(len(scene.objects) for scene in scenes)
    for num_objects, probability in zip((1, 2, 3, 4), (0.12, 0.33, 0.33, 0.22), strict=True):
        assert counts[num_objects] / len(scenes) == pytest.approx(probability, abs=0.05)
    with_duplicates = [scene for scene in scenes if len(set(pairs(scene))) < len(scene.objects)]
    assert len(with_duplicates) / len(scenes) == pytest.approx((1 - 0.12) * 0.35, abs=0.05)
    assert {scene.floor for scene in scenes} == set(FLOORS)
    assert {obj.texture for scene in scenes for obj in scene.objects} == set(TEXTURES)


def test_all_pairs_of_color_and_shape_are_about_equally_frequent(scenes: list[Scene]) -> None:
    counts = Counter(pair for scene in scenes for pair in set(pairs(scene)))
    assert set(counts) == {(color, shape) for color in COLORS for shape in SHAPES}
    mean = sum(counts.values()) / len(counts)
    assert min(counts.values()) > mean / 2
    assert max(counts.values()) < mean * 2
