import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scenes.renderer import Box, render
from pipeline.scenes.scene import COLORS, FLOORS, SHAPES, SIZES, TEXTURES, Scene, SceneObject, sample_scene

SPHERE = SceneObject(shape="sphere", color="red", size="large", texture="matte", x=0.0, z=7.0, yaw=0.1)
SCENE = Scene(
    objects=(SPHERE,),
    floor="tiled",
    tint=(1.0, 1.0, 1.0),
    light_direction=(0.48, 0.64, -0.6),
    light_intensity=1.0,
    camera_height=2.4,
    camera_pitch=2.0 / 7,
)
ALL_TEXTURES = replace(
    SCENE,
    floor="wooden",
    objects=(
        replace(SPHERE, shape="cube", color="blue", texture="shiny", x=-1.1, z=7.5, yaw=0.3),
        replace(SPHERE, shape="ring", color="black", texture="striped", x=0.4, z=5.5),
        replace(SPHERE, shape="pyramid", color="white", texture="spotted", x=1.3, z=8.5),
    ),
)
AT_THE_FRAME = replace(
    SCENE,
    floor="grassy",
    light_direction=(-0.6, 0.64, -0.48),
    objects=(
        replace(SPHERE, shape="cone", color="green", x=-1.95),
        replace(SPHERE, shape="cylinder", size="small", texture="shiny", x=1.7),
        replace(SPHERE, shape="cube", x=0.2, z=4.9, yaw=0.3),
    ),
)


def render_signed(*objects: SceneObject, image_size: int = 64) -> np.ndarray:
    """Render objects as signed integers, for differences between images."""
    return render(replace(SCENE, objects=objects), image_size).image.astype(int)


def crop_center(image: np.ndarray, box: Box, fraction: float = 0.4) -> np.ndarray:
    """Crop the central fraction of a box."""
    left, top, width, height = box
    x, y = left + width / 2, top + height / 2
    return image[
        round(y - fraction * height / 2) : round(y + fraction * height / 2) + 1,
        round(x - fraction * width / 2) : round(x + fraction * width / 2) + 1,
    ]


def digest(scene: Scene, image_size: int) -> str:
    return hashlib.sha256(render(scene, image_size).image.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (ALL_TEXTURES, "6fef1baed266c26ae89c1112745562877726d0703442bdfe373526e7d32ef2f8"),
        (AT_THE_FRAME, "cfa2e6aaba57746fc2ad3410816530668ce54376e6625cb505cd7699fc824228"),
        # The camera sees the floor only, the backdrop only, and mostly the backdrop.
        (
            replace(AT_THE_FRAME, floor="sandy", camera_pitch=1.0),
            "df0568d27fd9f2b826790952d67f137de04b3c4f961708d5cc27610100cb1122",
        ),
        (
            replace(AT_THE_FRAME, floor="carpeted", camera_pitch=-0.4),
            "a0f70d6833653ab7bc3868e36aa40279418d5168539b030bacd4d787ad16c76d",
        ),
        (
            replace(AT_THE_FRAME, floor="carpeted", camera_pitch=0.1),
            "6ba6730c43a8bded109daedc0133cfabe8e4c80aa74524503e8b74cf8bfe02d6",
        ),
    ],
)
def test_pixels_are_the_same_on_every_machine(scene, expected):
    assert digest(scene, 64) == expected


@pytest.mark.slow
def test_pixels_do_not_depend_on_vector_instructions():
    extensions = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    if not extensions:
        pytest.skip("numpy was built without vector instructions that can be disabled")
    code = "from tests.test_scenes_renderer import *; print(digest(ALL_TEXTURES, 64))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(extensions)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == digest(ALL_TEXTURES, 64)


def test_box_of_a_sphere_worked_by_hand():
    rendering = render(SCENE, 128)
    left, top, width, height = rendering.boxes[0]
    # The depth of its center is (7.0 + 2/7 * (2.4 - 0.5)) / sqrt(1 + 4/49) = 7.25, so 31.8 pixels per unit.
    assert left + width / 2 == pytest.approx(64, abs=0.5)
    assert width == pytest.approx(31.8, abs=1)
    assert height == pytest.approx(31.8, abs=1)
    # The center is (-1.9 + 2/7 * 7.0) / sqrt(1 + 4/49) = 0.1 above the optical axis.
    assert top + height / 2 == pytest.approx(64 - 0.1 * 31.8, abs=1)
    assert rendering.visibility == (1.0,)


def test_boxes_are_tight_around_the_pixels_of_an_object():
    # A light directly above puts the shadow below the object.
    scene = replace(SCENE, light_direction=(0.0, 1.0, 0.0), objects=(replace(SPHERE, shape="cone", x=0.6),))
    rendering = render(scene, 128)
    image = rendering.image.astype(int)
    mask = (image[..., 0] > 1.6 * image[..., 1]) & (image[..., 0] > 60)  # red pixels
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, width, height = rendering.boxes[0]
    assert columns[0] == pytest.approx(left, abs=2)
    assert columns[-1] + 1 == pytest.approx(left + width, abs=2)
    assert rows[0] == pytest.approx(top, abs=2)
    assert rows[-1] + 1 == pytest.approx(top + height, abs=2)


def test_boxes_scale_with_the_image():
    small, large = render(ALL_TEXTURES, 64), render(ALL_TEXTURES, 160)
    for small_box, large_box in zip(small.boxes, large.boxes, strict=True):
        assert np.array(small_box) * 2.5 == pytest.approx(np.array(large_box), abs=3)


def test_near_objects_hide_far_objects():
    near, far = replace(SPHERE, z=5.5), replace(SPHERE, x=0.1, z=7.0, color="blue")
    for objects in [(near, far), (far, near)]:
        visibility = dict(zip(objects, render(replace(SCENE, objects=objects), 96).visibility, strict=True))
        assert visibility[near] == 1.0
        assert 0.05 < visibility[far] < 0.7


def test_objects_are_clipped_by_the_frame():
    # The left edge of the frame is at about x = -2.01 for z = 7.
    rendering = render(replace(SCENE, objects=(replace(SPHERE, x=-2.01),)), 96)
    assert rendering.boxes[0][0] == 0
    assert rendering.visibility[0] == pytest.approx(0.5, abs=0.04)
    outside = render(replace(SCENE, objects=(replace(SPHERE, x=-9.0),)), 96)
    assert outside.boxes == ((0.0, 0.0, 0.0, 0.0),)
    assert outside.visibility == (0.0,)


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_objects_of_sampled_scenes_fit_the_frame_and_are_not_too_small(seed: int):
    scene = sample_scene(np.random.default_rng(seed), forbidden=frozenset(), required=None, duplicate_rate=0.35)
    for obj in scene.objects:
        rendering = render(replace(scene, objects=(obj,)), 64)
        # The corner of a cube may cross the edge of the frame.
        assert rendering.visibility[0] > 0.97
        assert min(rendering.boxes[0][2:]) > 5


@pytest.mark.slow
@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("light_direction", [(0.0, 0.96, -0.28), (0.6, 0.64, -0.48), (-0.6, 0.64, -0.48)])
def test_colors_differ_from_each_other_and_from_the_floor(floor, light_direction):
    means = {}
    for color in COLORS:
        scene = replace(SCENE, floor=floor, light_direction=light_direction, objects=(replace(SPHERE, color=color),))
        rendering = render(scene, 40)
        means[color] = crop_center(rendering.image, rendering.boxes[0]).mean(axis=(0, 1))
        means["floor"] = rendering.image[30:, :10].mean(axis=(0, 1))
    for a, b in combinations(means, 2):
        assert np.abs(means[a] - means[b]).max() > 35, (a, b)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_textures_differ(shape):
    # Most of the box is compared, since a ring has a hole in the middle.
    def crop(texture):
        scene = replace(SCENE, objects=(replace(SPHERE, shape=shape, texture=texture, color="blue"),))
        rendering = render(scene, 96)
        return crop_center(rendering.image, rendering.boxes[0], fraction=0.9).astype(int)

    pale_fraction = {texture: np.mean(crop(texture)[..., 0] > 100) for texture in TEXTURES}
    assert pale_fraction["striped"] > pale_fraction["matte"] + 0.1
    assert pale_fraction["spotted"] > pale_fraction["matte"] + 0.05
    assert crop("shiny").max() > crop("matte").max()


def test_shiny_objects_reflect_their_neighbors_and_matte_ones_do_not():
    def max_change(texture):
        ball = replace(SPHERE, color="white", texture=texture, x=-0.55)
        red, black = (
            render_signed(ball, replace(SPHERE, shape="cube", color=color, x=0.65), image_size=96)
            for color in ("red", "black")
        )
        return np.abs(red - black)[:, :46].max()  # the half with the ball

    assert max_change("matte") == 0
    assert max_change("shiny") > 20


def test_objects_cast_shadows_on_the_floor_and_on_each_other():
    light_from_the_left = (-0.8, 0.6, 0.0)
    right = replace(SPHERE, x=1.0, color="white")
    left = replace(SPHERE, x=-0.4, color="white")
    single = render(replace(SCENE, light_direction=light_from_the_left, objects=(right,)), 96)
    both = render(replace(SCENE, light_direction=light_from_the_left, objects=(right, left)), 96)
    darkening = single.image.astype(int) - both.image.astype(int)
    assert crop_center(darkening, single.boxes[0], fraction=1.0).max() > 40
    # There is only floor between the two objects.
    floor_row = round(single.boxes[0][1] + single.boxes[0][3]) - 3
    gap = slice(round(both.boxes[1][0] + both.boxes[1][2]) + 2, round(single.boxes[0][0]) - 2)
    assert darkening[floor_row, gap].max() > 25


@pytest.mark.slow
@settings(max_examples=20)
@given(yaw=st.floats(0, 1, exclude_max=True), x=st.sampled_from([-1.4, 0.0, 1.4]), size=st.sampled_from(SIZES))
def test_the_floor_is_visible_through_a_ring_whatever_its_yaw(yaw, x, size):
    ring = replace(SPHERE, shape="ring", yaw=yaw, x=x, size=size)
    rendering = render(replace(SCENE, objects=(ring,)), 128)
    red, green, _ = crop_center(rendering.image, rendering.boxes[0], fraction=0.0)[0, 0].astype(int)
    assert red < 1.3 * green


def test_floors_differ():
    lower_halves = [render(replace(SCENE, floor=floor), 32).image[16:].astype(int) for floor in FLOORS]
    for a, b in combinations(lower_halves, 2):
        assert np.abs(a - b).mean() > 8
