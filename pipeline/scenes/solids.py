"""Bodies as signed distance fields, which rays meet by sphere tracing.

Hart, "Sphere tracing: a geometric method for the antialiased ray tracing of implicit surfaces", The Visual
Computer 12, 1996.

`R` points or rays in a flat array; points and unit directions are float32 [3, R].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.scenes.scene import Body, Shape, Size
from pipeline.scenes.vectors import Reals, Vector, column, dot, eased, length, unit

SCALES: Mapping[Size, float] = {"small": 0.64, "large": 1.0}

_HIT = 0.002
_TRACE_STEPS = 48
_SHADOW_STEPS = 16
_NORMAL_STEP = 0.003
_LAMP_SHARPNESS = 9.0
"""Distance to the lamp in units of its width: more makes the edges of shadows harder."""
_RING_SWAY = 1 / 6
"""Turns between the extreme views of a ring: it keeps near to facing the camera, lest its hole close."""


@dataclass(frozen=True, kw_only=True)
class _Form:
    """A shape of about unit height around its own origin."""

    distance: Callable[[Reals], Reals]
    """A bound, exact or too small, on the distance from points to the surface: [R], negative inside."""
    half_height: float
    radius: float
    """Radius of a ball around the origin that holds the shape."""


@dataclass(frozen=True, kw_only=True)
class Solid:
    """A body in its place."""

    body: Body
    center: Vector
    scale: float
    """World units for one of the body's own."""
    axis: tuple[float, float]
    """Cosine and sine of the rotation about the vertical."""
    form: _Form

    @classmethod
    def of(cls, body: Body) -> "Solid":
        """Stand a body on the floor."""
        form, scale = _FORMS[body.shape], SCALES[body.size]
        turn = (body.turn - 0.5) * _RING_SWAY if body.shape == "ring" else body.turn
        center = (body.x, form.half_height * scale, body.z)
        return cls(body=body, center=center, scale=scale, axis=rotation(turn), form=form)

    @property
    def radius(self) -> float:
        """Radius of a ball around the center that holds the body."""
        return self.form.radius * self.scale

    def local(self, points: Reals) -> Reals:
        """World points in the body's own frame and unit."""
        return self._turned_in((points - column(self.center)) * (1 / self.scale))

    def turned_out(self, vectors: Reals) -> Reals:
        """The body's directions in the world."""
        cosine, sine = self.axis
        x, y, z = vectors
        return np.stack([cosine * x + sine * z, y, cosine * z - sine * x])

    def _turned_in(self, vectors: Reals) -> Reals:
        cosine, sine = self.axis
        x, y, z = vectors
        return np.stack([cosine * x - sine * z, y, sine * x + cosine * z])

    def gap(self, points: Reals) -> Reals:
        """Distance [R] from world points to the surface, or less where an edge is nearest."""
        return self.form.distance(self.local(points)) * np.float32(self.scale)

    def meet(self, start: Reals, directions: Reals) -> Reals:
        """Distance [R] along rays to the surface, infinite where they miss it.

        `start` is [3, R], or [3, 1] for rays from one point.
        """
        met = np.full(directions.shape[1], np.inf, dtype=np.float32)
        origin, heading = self.local(start), self._turned_in(directions)
        along = -dot(origin, heading)
        reach = self.form.radius * self.form.radius - (dot(origin, origin) - along * along)
        rays = np.flatnonzero((reach > 0) & (along > 0))
        half_chord = np.sqrt(reach[rays])
        traveled, last = along[rays] - half_chord, along[rays] + half_chord
        origin = np.broadcast_to(origin, directions.shape)[:, rays]
        heading = heading[:, rays]
        for _ in range(_TRACE_STEPS):
            gap = self.form.distance(origin + heading * traveled)
            traveled = traveled + gap
            arrived = gap < _HIT
            met[rays[arrived]] = traveled[arrived] * self.scale
            going = np.flatnonzero(~arrived & (traveled < last))
            if len(going) == 0:
                break
            rays, traveled, last = rays[going], traveled[going], last[going]
            origin, heading = origin[:, going], heading[:, going]
        return met

    def light_past(self, points: Reals, lamp: Vector) -> Reals:
        """Share [R] of the lamp's light that reaches world points in spite of this body.

        The closer a point's ray to the lamp passes the body, seen from that point, the deeper its half shadow.
        """
        passed = np.ones(points.shape[1], dtype=np.float32)
        origin, heading = self.local(points), self._turned_in(column(lamp))
        along = -dot(origin, heading)
        aside_squared = dot(origin, origin) - along * along
        reach = self.form.radius + np.maximum(along, 0.0) * (1 / _LAMP_SHARPNESS)
        rays = np.flatnonzero((along > -self.form.radius) & (aside_squared < reach * reach))
        origin = origin[:, rays]
        traveled = np.maximum(along[rays] - 1.2 * self.form.radius, 0.03)
        share = np.ones(len(rays), dtype=np.float32)
        for _ in range(_SHADOW_STEPS):
            gap = self.form.distance(origin + heading * traveled)
            np.minimum(share, gap * _LAMP_SHARPNESS / traveled, out=share)
            traveled = traveled + np.clip(gap, 0.03, 2.4 * self.form.radius / _SHADOW_STEPS)
        passed[rays] = eased(np.maximum(share, 0.0))
        return passed

    def normals(self, local: Reals) -> Reals:
        """Unit world normals at points of the surface given in the body's frame."""
        gradient = np.zeros_like(local)
        for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            signs = column(corner)
            gradient += signs * self.form.distance(local + signs * np.float32(_NORMAL_STEP))
        return self.turned_out(unit(gradient))


def rotation(turn: float) -> tuple[float, float]:
    """Cosine and sine of an angle given in turns, right to about a thousandth.

    Bhaskara's rational approximation, scaled to unit length: the cosine of the C library may differ in its last
    bit between machines.
    """
    cosine, sine = _sine(turn + 0.25), _sine(turn)
    scale = math.sqrt(sine * sine + cosine * cosine)
    return cosine / scale, sine / scale


def _sine(turn: float) -> float:
    halves = 2 * (turn - math.floor(turn))
    part = halves - math.floor(halves)
    arch = 16 * part * (1 - part) / (5 - 4 * part * (1 - part))
    return arch if halves < 1 else -arch


def _sphere(p: Reals) -> Reals:
    return length(*p) - np.float32(0.5)


def _cube(p: Reals) -> Reals:
    x, y, z = np.abs(p)
    return _rounded_max(_rounded_max(x, z, 0.06), y, 0.06) - np.float32(0.42)


def _cylinder(p: Reals) -> Reals:
    return _rounded_max(length(p[0], p[2]) - np.float32(0.4), np.abs(p[1]) - np.float32(0.46), 0.06)


def _cone(p: Reals) -> Reals:
    return _tapered(length(p[0], p[2]), p[1], 0.52)


def _ring(p: Reals) -> Reals:
    return length(length(p[0], p[1]) - np.float32(0.36), p[2]) - np.float32(0.14)


def _pyramid(p: Reals) -> Reals:
    return _tapered(_rounded_max(np.abs(p[0]), np.abs(p[2]), 0.05), p[1], 0.5)


def _tapered(out: Reals, y: Reals, base: float) -> Reals:
    """Distance to a solid a unit high that narrows from `base` at the bottom to a point."""
    slant = math.sqrt(1 + base * base)
    side = out * (1 / slant) + (y - np.float32(0.5)) * (base / slant)
    return _rounded_max(side, np.float32(-0.5) - y, 0.05)


def _rounded_max(a: Reals, b: Reals, radius: float) -> Reals:
    """The larger of two distances, with the edge where they meet rounded off."""
    overlap = np.maximum(radius - np.abs(a - b), 0.0)
    rounded: Reals = np.maximum(a, b) + overlap * overlap * (0.25 / radius)
    return rounded


_FORMS: Mapping[Shape, _Form] = {
    "sphere": _Form(distance=_sphere, half_height=0.5, radius=0.51),
    "cube": _Form(distance=_cube, half_height=0.42, radius=0.74),
    "cylinder": _Form(distance=_cylinder, half_height=0.46, radius=0.62),
    "cone": _Form(distance=_cone, half_height=0.5, radius=0.73),
    "ring": _Form(distance=_ring, half_height=0.5, radius=0.51),
    "pyramid": _Form(distance=_pyramid, half_height=0.5, radius=0.88),
}
