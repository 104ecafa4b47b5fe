import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scenes.distance_fields import ObjectField, rotation
from pipeline.scenes.scene import FOOTPRINT_RADIUS, SHAPES, SIZES, SceneObject
from pipeline.scenes.vectors import Vector, column, dot, length, normalize, smoothstep

SPHERE = SceneObject(shape="sphere", color="red", size="large", texture="matte", x=0.3, z=7.0, yaw=0.0)
scene_objects = st.builds(
    SceneObject,
    shape=st.sampled_from(SHAPES),
    color=st.just("red"),
    size=st.sampled_from(SIZES),
    texture=st.just("matte"),
    x=st.floats(-2, 2),
    z=st.floats(5, 9),
    yaw=st.floats(0, 1, exclude_max=True),
)


def rays_towards(field: ObjectField) -> tuple[np.ndarray, np.ndarray]:
    """Return a camera position [3, 1] and directions [3, 400] from it towards the object's bounding box."""
    origin = column((0.0, 2.5, 0.0))
    rng = np.random.default_rng(0)
    targets = column(field.center) + rng.uniform(-1, 1, (3, 400)).astype(np.float32) * field.bounding_radius
    return origin, normalize(targets - origin)


@settings(max_examples=40)
@given(scene_object=scene_objects)
def test_rays_hit_the_surface_from_outside(scene_object):
    field = ObjectField.from_object(scene_object)
    origin, directions = rays_towards(field)
    hits = field.intersect(origin, directions)
    is_hit = np.isfinite(hits)
    assert is_hit.mean() > 0.1
    points = origin + directions[:, is_hit] * hits[is_hit]
    assert np.abs(field.distance(points)).max() < 0.004
    assert points[1].min() > -0.01
    normals = field.normals(field.to_object_space(points))
    assert length(*normals) == pytest.approx(1, abs=1e-5)
    # At the silhouette a ray may graze the surface.
    assert dot(directions[:, is_hit], normals).max() < 0.25


@settings(max_examples=40)
@given(scene_object=scene_objects)
def test_objects_stand_on_the_floor_within_their_footprint(scene_object):
    field = ObjectField.from_object(scene_object)
    rng = np.random.default_rng(1)
    extent = 1.3 * field.scale
    offsets = rng.uniform(-extent, extent, (3, 4000)).astype(np.float32)
    points = column((scene_object.x, 0.0, scene_object.z)) + offsets
    inside = points[:, field.distance(points) < 0]
    assert inside[1].min() > -0.01
    assert inside[1].min() < 0.25 * field.scale
    footprint_radius = length(inside[0] - scene_object.x, inside[2] - scene_object.z).max()
    assert footprint_radius < FOOTPRINT_RADIUS[scene_object.size] * 1.25
    assert length(*(inside - column(field.center))).max() < field.bounding_radius


def test_intersection_with_a_sphere_worked_by_hand():
    field = ObjectField.from_object(SPHERE)
    hits = field.intersect(column((0.3, 0.5, 0.0)), np.array([[0, 0], [0, 1], [1, 0]], dtype=np.float32))
    assert hits[0] == pytest.approx(6.5, abs=0.004)
    assert hits[1] == np.inf


def test_light_is_blocked_behind_an_object_and_partly_blocked_near_its_silhouette():
    field = ObjectField.from_object(SPHERE)
    light_direction = (1.0, 0.0, 0.0)
    offsets = [0.0, 0.45, 0.53, 0.65, 2.0]
    points = np.array([[-1.0] * 5, [0.5] * 5, [7.0 + offset for offset in offsets]], dtype=np.float32)
    visibility = field.soft_shadow(points, light_direction)
    assert visibility[:2] == pytest.approx(0)
    assert 0 < visibility[2] < visibility[3]
    assert visibility[4] == 1
    points_towards_light = points + column((2.6, 0.0, 0.0))
    assert field.soft_shadow(points_towards_light, light_direction) == pytest.approx(1)


def soft_shadow_of_all(field: ObjectField, points: np.ndarray, light_direction: Vector) -> np.ndarray:
    """Trace a ray from every point through the whole of the object, without any test that saves work."""
    origin, heading = field.to_object_space(points), field._rotate_to_object(column(light_direction))
    radius = field.shape_field.bounding_radius
    closest = -dot(origin, heading)
    max_miss = radius + np.maximum(closest, 0) / np.float32(9)
    is_near = (closest > -radius) & (dot(origin, origin) - closest * closest < max_miss * max_miss)
    t = np.maximum(closest - 1.2 * radius, 0.03)
    min_ratio = np.ones_like(t)
    for _ in range(16):
        distance = field.shape_field.distance(origin + heading * t)
        min_ratio = np.minimum(min_ratio, distance * 9.0 / t)
        t = t + np.clip(distance, 0.03, 2.4 * radius / 16)
    return np.where(is_near, smoothstep(np.maximum(min_ratio, 0)), 1)


@settings(max_examples=30)
@given(
    scene_object=scene_objects,
    azimuth=st.floats(0, math.tau),
    elevation=st.floats(0, math.pi / 2),
    seed=st.integers(0, 1000),
)
def test_soft_shadow_skips_only_rays_that_change_nothing(scene_object, azimuth, elevation, seed):
    horizontal = math.cos(elevation)
    light_direction = (horizontal * math.cos(azimuth), math.sin(elevation), horizontal * math.sin(azimuth))
    field = ObjectField.from_object(scene_object)
    rng = np.random.default_rng(seed)
    # From 0.5 to 30 units away; half of the points are on the floor.
    offsets = rng.uniform(-1, 1, (3, 1500)) * np.geomspace(0.5, 30, 1500)
    points = (column(field.center) + offsets).astype(np.float32)
    points[1] = np.maximum(offsets[1], 0)
    visibility = field.soft_shadow(points, light_direction)
    assert (visibility == soft_shadow_of_all(field, points, light_direction)).all()
    assert visibility.min() < 0.5


@pytest.mark.parametrize("angle", np.linspace(-1, 2, 61).tolist())
def test_rotation_approximates_cosine_and_sine(angle):
    cosine, sine = rotation(angle)
    assert math.hypot(cosine, sine) == pytest.approx(1)
    assert cosine == pytest.approx(math.cos(math.tau * angle), abs=2e-3)
    assert sine == pytest.approx(math.sin(math.tau * angle), abs=2e-3)


def test_object_space_round_trip():
    field = ObjectField.from_object(replace(SPHERE, shape="cube", yaw=0.37, size="small"))
    points = np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32)
    round_trip = field.rotate_to_world(field.to_object_space(points)) * field.scale + column(field.center)
    assert round_trip == pytest.approx(points, abs=1e-5)
