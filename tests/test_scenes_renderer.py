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

from pipeline.scenes.renderer import render
from pipeline.scenes.scene import COLORS, FLOORS, SHAPES, SIZES, TEXTURES, Body, Scene, draw_scene

BODY = Body(shape="sphere", color="red", size="large", texture="matte", x=0.0, z=7.0, turn=0.1)
SCENE = Scene(
    bodies=(BODY,),
    floor="tiled",
    hue_shift=(1.0, 1.0, 1.0),
    light=(0.48, 0.64, -0.6),
    brightness=1.0,
    camera_height=2.4,
    camera_tilt=2.0 / 7,
)
EVERYTHING = replace(
    SCENE,
    floor="wooden",
    bodies=(
        replace(BODY, shape="cube", color="blue", texture="shiny", x=-1.1, z=7.5, turn=0.3),
        replace(BODY, shape="ring", color="black", texture="striped", x=0.4, z=5.5),
        replace(BODY, shape="pyramid", color="white", texture="spotted", x=1.3, z=8.5),
    ),
)
DIGEST = "6fef1baed266c26ae89c1112745562877726d0703442bdfe373526e7d32ef2f8"


def shown(*bodies: Body, size: int = 64) -> np.ndarray:
    """The picture as signed numbers, which can be subtracted."""
    return render(replace(SCENE, bodies=bodies), size).image.astype(int)


def middle(image: np.ndarray, box: tuple[float, float, float, float], share: float = 0.4) -> np.ndarray:
    left, top, width, height = box
    across, down = left + width / 2, top + height / 2
    return image[
        round(down - share * height / 2) : round(down + share * height / 2) + 1,
        round(across - share * width / 2) : round(across + share * width / 2) + 1,
    ]


def digest(scene: Scene, size: int) -> str:
    return hashlib.sha256(render(scene, size).image.tobytes()).hexdigest()


def test_pixels_are_the_same_on_every_machine():
    assert digest(EVERYTHING, 64) == DIGEST


def test_pixels_do_not_depend_on_the_processors_vector_instructions():
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    if not found:
        pytest.skip("numpy was built without vector instructions to switch off")
    code = "from tests.test_scenes_renderer import *; print(digest(EVERYTHING, 64))"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(found)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == digest(EVERYTHING, 64)


def test_a_sphere_is_boxed_where_the_camera_sees_it():
    rendering = render(SCENE, 128)
    left, top, width, height = rendering.boxes[0]
    # Its center is (7.0 + 2/7 * (2.4 - 0.5)) / sqrt(1 + 4/49) = 7.25 ahead of the camera, so 31.8 pixels a unit.
    assert left + width / 2 == pytest.approx(64, abs=0.5)
    assert width == pytest.approx(31.8, abs=1)
    assert height == pytest.approx(31.8, abs=1)
    # And (-1.9 + 2/7 * 7.0) / sqrt(1 + 4/49) = 0.1 above the line of sight.
    assert top + height / 2 == pytest.approx(64 - 0.1 * 31.8, abs=1)
    assert rendering.visible == (1.0,)


def test_boxes_bound_what_a_body_changes_in_the_picture():
    # Under a lamp straight above its shadow stays below it.
    scene = replace(SCENE, light=(0.0, 1.0, 0.0), bodies=(replace(BODY, shape="cone", x=0.6),))
    rendering = render(scene, 128)
    red = rendering.image.astype(int)
    mask = (red[..., 0] > 1.6 * red[..., 1]) & (red[..., 0] > 60)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top, width, height = rendering.boxes[0]
    assert columns[0] == pytest.approx(left, abs=2)
    assert columns[-1] + 1 == pytest.approx(left + width, abs=2)
    assert rows[0] == pytest.approx(top, abs=2)
    assert rows[-1] + 1 == pytest.approx(top + height, abs=2)


def test_boxes_scale_with_the_picture():
    small, large = render(EVERYTHING, 64), render(EVERYTHING, 160)
    for one, other in zip(small.boxes, large.boxes, strict=True):
        assert np.array(one) * 2.5 == pytest.approx(np.array(other), abs=3)


def test_what_stands_in_front_hides_what_stands_behind():
    near, far = replace(BODY, z=5.5), replace(BODY, x=0.1, z=7.0, color="blue")
    for bodies in [(near, far), (far, near)]:
        shares = dict(zip(bodies, render(replace(SCENE, bodies=bodies), 96).visible, strict=True))
        assert shares[near] == 1.0
        assert 0.05 < shares[far] < 0.7


def test_the_frame_hides_what_lies_outside():
    # The ray along the frame's left edge meets z = 7 at x = -2.01 or so.
    rendering = render(replace(SCENE, bodies=(replace(BODY, x=-2.01),)), 96)
    assert rendering.boxes[0][0] == 0
    assert rendering.visible[0] == pytest.approx(0.5, abs=0.04)
    outside = render(replace(SCENE, bodies=(replace(BODY, x=-9.0),)), 96)
    assert outside.boxes == ((0.0, 0.0, 0.0, 0.0),)
    assert outside.visible == (0.0,)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_bodies_of_drawn_scenes_fit_the_frame_and_are_large_enough_to_name(seed: int):
    scene = draw_scene(np.random.default_rng(seed), forbidden=frozenset(), required=None, duplicate_rate=0.35)
    for body in scene.bodies:
        alone = render(replace(scene, bodies=(body,)), 64)
        # The corner of a cube may just pass the edge.
        assert alone.visible[0] > 0.97
        assert min(alone.boxes[0][2:]) > 5


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("light", [(0.0, 0.96, -0.28), (0.6, 0.64, -0.48), (-0.6, 0.64, -0.48)])
def test_colors_can_be_told_apart_from_each_other_and_from_the_floor(floor, light):
    means = {}
    for color in COLORS:
        scene = replace(SCENE, floor=floor, light=light, bodies=(replace(BODY, color=color),))
        rendering = render(scene, 40)
        means[color] = middle(rendering.image, rendering.boxes[0]).mean(axis=(0, 1))
        means["floor"] = rendering.image[30:, :10].mean(axis=(0, 1))
    for one, other in combinations(means, 2):
        assert np.abs(means[one] - means[other]).max() > 35, (one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_textures_look_as_they_are_called(shape):
    # Low and tall shapes alike show their middle; a ring has none, so look at all of its box.
    def area(texture):
        scene = replace(SCENE, bodies=(replace(BODY, shape=shape, texture=texture, color="blue"),))
        rendering = render(scene, 96)
        return middle(rendering.image, rendering.boxes[0], share=0.9).astype(int)

    pale = {texture: np.mean(area(texture)[..., 0] > 100) for texture in TEXTURES}
    plain = pale["matte"]
    assert pale["striped"] > plain + 0.1
    assert pale["spotted"] > plain + 0.05
    assert area("shiny").max() > area("matte").max()


def test_a_shiny_body_mirrors_its_neighbor_and_a_matte_one_does_not():
    def change(texture):
        ball = replace(BODY, color="white", texture=texture, x=-0.55)
        red, black = (
            shown(ball, replace(BODY, shape="cube", color=color, x=0.65), size=96) for color in ("red", "black")
        )
        left_half = np.abs(red - black)[:, :46]
        return left_half.max()

    assert change("matte") == 0
    assert change("shiny") > 20


def test_bodies_throw_shadows_on_the_floor_and_on_each_other():
    lamp_from_the_left = (-0.8, 0.6, 0.0)
    bare = replace(SCENE, light=lamp_from_the_left, bodies=(replace(BODY, x=1.0, color="white"),))
    both = replace(bare, bodies=(*bare.bodies, replace(BODY, x=-0.4, color="white")))
    alone, shaded = render(bare, 96), render(both, 96)
    fall = alone.image.astype(int) - shaded.image.astype(int)
    assert middle(fall, alone.boxes[0], share=1.0).max() > 40
    # Between the two stands nothing but floor.
    floor_row = round(alone.boxes[0][1] + alone.boxes[0][3]) - 3
    gap = slice(round(shaded.boxes[1][0] + shaded.boxes[1][2]) + 2, round(alone.boxes[0][0]) - 2)
    assert fall[floor_row, gap].max() > 25


@settings(max_examples=20, deadline=None)
@given(turn=st.floats(0, 1, exclude_max=True), x=st.sampled_from([-1.4, 0.0, 1.4]), size=st.sampled_from(SIZES))
def test_a_ring_shows_the_floor_through_its_hole_however_it_is_turned(turn, x, size):
    ring = replace(BODY, shape="ring", turn=turn, x=x, size=size)
    rendering = render(replace(SCENE, bodies=(ring,)), 128)
    red, green, _ = middle(rendering.image, rendering.boxes[0], share=0.0)[0, 0].astype(int)
    assert red < 1.3 * green


def test_floors_differ():
    views = [render(replace(SCENE, floor=floor), 32).image[16:].astype(int) for floor in FLOORS]
    for one, other in combinations(views, 2):
        assert np.abs(one - other).mean() > 8
