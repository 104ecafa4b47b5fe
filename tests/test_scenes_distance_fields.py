import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scenes.scene import FOOTPRINT, SHAPES, SIZES, Body
from pipeline.scenes.solids import Solid, rotation
from pipeline.scenes.vectors import column, dot, length, unit

BODY = Body(shape="sphere", color="red", size="large", texture="matte", x=0.3, z=7.0, turn=0.0)
bodies = st.builds(
    Body,
    shape=st.sampled_from(SHAPES),
    color=st.just("red"),
    size=st.sampled_from(SIZES),
    texture=st.just("matte"),
    x=st.floats(-2, 2),
    z=st.floats(5, 9),
    turn=st.floats(0, 1, exclude_max=True),
)


def rays_at(solid: Solid) -> tuple[np.ndarray, np.ndarray]:
    """An eye, and rays from it all over the ball that holds the solid."""
    eye = column((0.0, 2.5, 0.0))
    rng = np.random.default_rng(0)
    aims = column(solid.center) + rng.uniform(-1, 1, (3, 400)).astype(np.float32) * solid.radius
    return eye, unit(aims - eye)


@settings(max_examples=40, deadline=None)
@given(body=bodies)
def test_rays_end_on_the_surface_and_face_its_normal(body):
    solid = Solid.of(body)
    eye, directions = rays_at(solid)
    met = solid.meet(eye, directions)
    hit = np.isfinite(met)
    assert hit.mean() > 0.1
    points = eye + directions[:, hit] * met[hit]
    assert np.abs(solid.gap(points)).max() < 0.004
    assert points[1].min() > -0.01
    normals = solid.normals(solid.local(points))
    assert length(*normals) == pytest.approx(1, abs=1e-5)
    # At the rim a ray may just graze the surface.
    assert dot(directions[:, hit], normals).max() < 0.25


@settings(max_examples=40, deadline=None)
@given(body=bodies)
def test_bodies_stand_on_the_floor_within_their_footprint(body):
    solid = Solid.of(body)
    rng = np.random.default_rng(1)
    reach = 1.3 * solid.scale
    points = column((body.x, 0.0, body.z)) + rng.uniform(-reach, reach, (3, 4000)).astype(np.float32)
    inside = points[:, solid.gap(points) < 0]
    assert inside[1].min() > -0.01
    assert inside[1].min() < 0.25 * solid.scale
    assert length(inside[0] - body.x, inside[2] - body.z).max() < FOOTPRINT[body.size] * 1.25
    assert length(*(inside - column(solid.center))).max() < solid.radius


def test_a_ray_meets_a_sphere_where_geometry_says():
    solid = Solid.of(BODY)
    met = solid.meet(column((0.3, 0.5, 0.0)), np.array([[0, 0], [0, 1], [1, 0]], dtype=np.float32))
    assert met[0] == pytest.approx(6.5, abs=0.004)
    assert met[1] == np.inf


def test_light_is_blocked_behind_a_body_and_half_blocked_past_its_rim():
    solid = Solid.of(BODY)
    lamp = (1.0, 0.0, 0.0)
    offsets = [0.0, 0.45, 0.53, 0.65, 2.0]
    points = np.array([[-1.0] * 5, [0.5] * 5, [7.0 + offset for offset in offsets]], dtype=np.float32)
    passed = solid.light_past(points, lamp)
    assert passed[:2] == pytest.approx(0)
    assert 0 < passed[2] < passed[3]
    assert passed[4] == 1
    beyond = points + column((2.6, 0.0, 0.0))
    assert solid.light_past(beyond, lamp) == pytest.approx(1)


@pytest.mark.parametrize("turn", np.linspace(-1, 2, 61).tolist())
def test_rotation_is_a_rotation(turn):
    cosine, sine = rotation(turn)
    assert math.hypot(cosine, sine) == pytest.approx(1)
    assert cosine == pytest.approx(math.cos(math.tau * turn), abs=2e-3)
    assert sine == pytest.approx(math.sin(math.tau * turn), abs=2e-3)


def test_turning_in_and_out_again_changes_nothing():
    solid = Solid.of(replace(BODY, shape="cube", turn=0.37, size="small"))
    points = np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32)
    back = solid.turned_out(solid.local(points)) * solid.scale + column(solid.center)
    assert back == pytest.approx(points, abs=1e-5)
