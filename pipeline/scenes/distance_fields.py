"""Signed distance fields of the objects, and their intersection with rays by sphere tracing.

Hart, "Sphere tracing: a geometric method for the antialiased ray tracing of implicit surfaces", The Visual Computer 12,
1996.

R points or rays in a flat array; points and unit directions are float32 [3, R]. In object space the object is centered
on the origin, neither rotated nor scaled.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scenes.scene import SceneObject, Shape, Size
from pipeline.scenes.vectors import FloatArray, Vector, column, dot, length, normalize, smoothstep

SCALES: Mapping[Size, float] = {"small": 0.64, "large": 1.0}

_SURFACE_EPSILON = 0.002
_NUM_TRACE_STEPS = 48
_NUM_SHADOW_STEPS = 16
_GRADIENT_STEP = 0.003
_SHADOW_SHARPNESS = 9.0
"""Inverse of the light's angular radius in radians; higher values give harder shadows."""
_SHADOW_MARGIN = 0.05
"""Margin of the rectangle that contains a shadow, in world units; rounding errors are far smaller."""
_RING_YAW_RANGE = 1 / 6
"""Range of the yaw of rings, in turns: they roughly face the camera, so that their hole is visible."""


@dataclass(frozen=True, kw_only=True)
class _ShapeField:
    """Distance field of a shape of about unit height, centered on the origin."""

    distance: Callable[[FloatArray], FloatArray]
    """Maps points [3, R] to signed distances [R], negative inside; exact or underestimated."""
    half_height: float
    bounding_radius: float
    """Radius of a sphere around the origin that contains the shape."""


@dataclass(frozen=True, kw_only=True)
class ObjectField:
    """Signed distance field of an object in world coordinates."""

    scene_object: SceneObject
    center: Vector
    scale: float
    """World units per unit of object space."""
    axis: tuple[float, float]
    """Cosine and sine of the yaw."""
    shape_field: _ShapeField

    @classmethod
    def from_object(cls, scene_object: SceneObject) -> "ObjectField":
        """Build the field of an object that stands on the floor."""
        shape_field, scale = _SHAPE_FIELDS[scene_object.shape], SCALES[scene_object.size]
        yaw = (scene_object.yaw - 0.5) * _RING_YAW_RANGE if scene_object.shape == "ring" else scene_object.yaw
        center = (scene_object.x, shape_field.half_height * scale, scene_object.z)
        return cls(scene_object=scene_object, center=center, scale=scale, axis=rotation(yaw), shape_field=shape_field)

    @property
    def bounding_radius(self) -> float:
        """Radius of a sphere around the center that contains the object, in world units."""
        return self.shape_field.bounding_radius * self.scale

    def to_object_space(self, points: FloatArray) -> FloatArray:
        """Transform world points [3, R] to object space."""
        return self._rotate_to_object((points - column(self.center)) * (1 / self.scale))

    def rotate_to_world(self, directions: FloatArray) -> FloatArray:
        """Rotate directions [3, R] from object space to the world."""
        cosine, sine = self.axis
        x, y, z = directions
        return np.stack([cosine * x + sine * z, y, cosine * z - sine * x])

    def _rotate_to_object(self, directions: FloatArray) -> FloatArray:
        cosine, sine = self.axis
        x, y, z = directions
        return np.stack([cosine * x - sine * z, y, sine * x + cosine * z])

    def distance(self, points: FloatArray) -> FloatArray:
        """Return a lower bound of the distance [R] from world points to the surface, negative inside."""
        return self.shape_field.distance(self.to_object_space(points)) * np.float32(self.scale)

    def intersect(self, origins: FloatArray, directions: FloatArray) -> FloatArray:
        """Intersect rays with the surface by sphere tracing.

        Args:
            origins: World points [3, R], or [3, 1] for rays from one point.
            directions: Unit vectors [3, R].

        Returns:
            Distances [R] along the rays, infinite where a ray misses the object.
        """
        hits = np.full(directions.shape[1], np.inf, dtype=np.float32)
        origin, heading = self.to_object_space(origins), self._rotate_to_object(directions)
        # Only rays that intersect the bounding sphere are traced, from where they enter it to where they leave it.
        closest = -dot(origin, heading)
        radius = self.shape_field.bounding_radius
        half_chord_squared = radius * radius - (dot(origin, origin) - closest * closest)
        rays = np.flatnonzero((half_chord_squared > 0) & (closest > 0))
        half_chord = np.sqrt(half_chord_squared[rays])
        t, t_exit = closest[rays] - half_chord, closest[rays] + half_chord
        origin = np.broadcast_to(origin, directions.shape).take(rays, axis=1)
        heading = heading.take(rays, axis=1)
        for _ in range(_NUM_TRACE_STEPS):
            distance = self.shape_field.distance(origin + heading * t)
            t = t + distance
            is_hit = distance < _SURFACE_EPSILON
            hits[rays[is_hit]] = t[is_hit] * self.scale
            active = np.flatnonzero(~is_hit & (t < t_exit))
            if len(active) == 0:
                break
            rays, t, t_exit = rays[active], t[active], t_exit[active]
            origin, heading = origin.take(active, axis=1), heading.take(active, axis=1)
        return hits

    def soft_shadow(self, points: FloatArray, light_direction: Vector) -> FloatArray:
        """Return the fraction [R] of the light that this object does not block.

        The fraction decreases with the smallest ratio, along the ray to the light, of the distance to the object to the
        distance traveled: https://iquilezles.org/articles/rmshadows/.

        Args:
            points: World points [3, R] on or above the floor.
            light_direction: Unit vector towards the light.
        """
        visibility = np.ones(points.shape[1], dtype=np.float32)
        rays = self._find_shadow(points, light_direction)
        origin = self.to_object_space(points.take(rays, axis=1))
        heading = self._rotate_to_object(column(light_direction))
        # Rays that miss the bounding sphere by more than the penumbra are fully lit.
        radius = self.shape_field.bounding_radius
        closest = -dot(origin, heading)
        miss_squared = dot(origin, origin) - closest * closest
        max_miss = radius + np.maximum(closest, 0.0) * (1 / _SHADOW_SHARPNESS)
        near = np.flatnonzero((closest > -radius) & (miss_squared < max_miss * max_miss))
        rays, origin = rays.take(near), origin.take(near, axis=1)
        t = np.maximum(closest.take(near) - 1.2 * radius, 0.03)
        min_ratio = np.ones(len(rays), dtype=np.float32)
        for _ in range(_NUM_SHADOW_STEPS if len(rays) else 0):
            distance = self.shape_field.distance(origin + heading * t)
            np.minimum(min_ratio, distance * _SHADOW_SHARPNESS / t, out=min_ratio)
            t = t + np.clip(distance, 0.03, 2.4 * radius / _NUM_SHADOW_STEPS)
        visibility[rays] = smoothstep(np.maximum(min_ratio, 0.0))
        return visibility

    def _find_shadow(self, points: FloatArray, light_direction: Vector) -> NDArray[np.intp]:
        """Return the indices [N] of world points [3, R] that may be in the object's shadow.

        These points are above a rectangle on the floor, which contains the shadow of the bounding sphere.
        """
        # That shadow is a cone, which widens from the sphere to its end on the floor, `reach` away from the center.
        radius = self.bounding_radius + _SHADOW_MARGIN
        sine = math.sqrt(max(1 - light_direction[1] * light_direction[1], 0.0))
        slope = max(light_direction[1] - sine / _SHADOW_SHARPNESS, 1e-6)
        reach = (self.center[1] + _SHADOW_MARGIN + sine * radius) / slope
        end_radius = radius + reach / _SHADOW_SHARPNESS
        is_near = np.ones(points.shape[1], dtype=np.bool_)
        for axis in (0, 2):
            start = self.center[axis] + light_direction[axis] * radius
            end = self.center[axis] - light_direction[axis] * reach
            is_near &= points[axis] > min(start - radius, end - end_radius)
            is_near &= points[axis] < max(start + radius, end + end_radius)
        return np.flatnonzero(is_near)

    def normals(self, points: FloatArray) -> FloatArray:
        """Return unit normals [3, R], in the world, at surface points [3, R] of object space."""
        # Finite differences at the vertices of a tetrahedron.
        gradient = np.zeros_like(points)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            signs = column(corner)
            gradient += signs * self.shape_field.distance(points + signs * np.float32(_GRADIENT_STEP))
        return self.rotate_to_world(normalize(gradient))


def rotation(angle: float) -> tuple[float, float]:
    """Return cosine and sine of an angle in turns, to within about 0.002.

    Bhaskara's rational approximation, normalized. The C library's cosine differs in its last bit between machines.
    """
    cosine, sine = _sine(angle + 0.25), _sine(angle)
    scale = math.sqrt(sine * sine + cosine * cosine)
    return cosine / scale, sine / scale


def _sine(angle: float) -> float:
    half_turns = 2 * (angle - math.floor(angle))
    t = half_turns - math.floor(half_turns)
    arch = 16 * t * (1 - t) / (5 - 4 * t * (1 - t))
    return arch if half_turns < 1 else -arch


def _sphere(p: FloatArray) -> FloatArray:
    return length(*p) - np.float32(0.5)


def _cube(p: FloatArray) -> FloatArray:
    x, y, z = np.abs(p)
    return _rounded_max(_rounded_max(x, z, 0.06), y, 0.06) - np.float32(0.42)


def _cylinder(p: FloatArray) -> FloatArray:
    return _rounded_max(length(p[0], p[2]) - np.float32(0.4), np.abs(p[1]) - np.float32(0.46), 0.06)


def _cone(p: FloatArray) -> FloatArray:
    return _tapered(length(p[0], p[2]), p[1], 0.52)


def _ring(p: FloatArray) -> FloatArray:
    return length(length(p[0], p[1]) - np.float32(0.36), p[2]) - np.float32(0.14)


def _pyramid(p: FloatArray) -> FloatArray:
    return _tapered(_rounded_max(np.abs(p[0]), np.abs(p[2]), 0.05), p[1], 0.5)


def _tapered(r: FloatArray, y: FloatArray, base_radius: float) -> FloatArray:
    """Return the distance to a shape of unit height that narrows from `base_radius` at the bottom to a point.

    `r` [R] is the distance from the vertical axis, in the norm that gives the cross section its shape.
    """
    slant = math.sqrt(1 + base_radius * base_radius)
    side = r * (1 / slant) + (y - np.float32(0.5)) * (base_radius / slant)
    return _rounded_max(side, np.float32(-0.5) - y, 0.05)


def _rounded_max(a: FloatArray, b: FloatArray, radius: float) -> FloatArray:
    """Return the distance [R] to the intersection of two shapes, with the common edge rounded to `radius`."""
    overlap = np.maximum(radius - np.abs(a - b), 0.0)
    rounded: FloatArray = np.maximum(a, b) + overlap * overlap * (0.25 / radius)
    return rounded


_SHAPE_FIELDS: Mapping[Shape, _ShapeField] = {
    "sphere": _ShapeField(distance=_sphere, half_height=0.5, bounding_radius=0.51),
    "cube": _ShapeField(distance=_cube, half_height=0.42, bounding_radius=0.74),
    "cylinder": _ShapeField(distance=_cylinder, half_height=0.46, bounding_radius=0.62),
    "cone": _ShapeField(distance=_cone, half_height=0.5, bounding_radius=0.73),
    "ring": _ShapeField(distance=_ring, half_height=0.5, bounding_radius=0.51),
    "pyramid": _ShapeField(distance=_pyramid, half_height=0.5, bounding_radius=0.88),
}
