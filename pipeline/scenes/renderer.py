"""Pictures of scenes: a small ray tracer whose pixels are the same bytes on every machine.

One soft lamp, the sky and the light that the floor throws back shine on the bodies; shiny ones mirror each
other and the floor. Pixels pass only through operations that IEEE 754 defines exactly (`+ - * /`, square
root, floor, comparison) and through hashed integers: no sine, power or matrix product, whose last bit depends
on the library and the processor.

The camera stands at (0, `camera_height`, 0) and looks along +z with a focal length of 1.8 image widths (31
degrees). With `camera_tilt` near (`camera_height` - 0.4) / 7 the frame holds whole bodies on the ground from
z = 4.9 to z = 9.2, as far to each side as |x| = 0.27 z - 0.45 (large) or 0.27 z - 0.15 (small); there a large
body is 42 to 24 pixels high in a picture of 128, a small one 23 to 13.

`R` rays or points in a flat array, `S` subsamples along a side of the picture. Points, directions and colors
are float32 [3, R]; colors are linear light, and 1 is the brightest that the picture can show.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scenes.floors import MATERIALS, linear
from pipeline.scenes.scene import Color, Scene
from pipeline.scenes.solids import Solid, rotation
from pipeline.scenes.vectors import Reals, Vector, column, dot, eased, length, mix, unit

FOCAL_LENGTH = 1.8
"""In widths of the picture."""

_SUPERSAMPLING = 2  # A side; _develop averages exactly four subsamples.
_RAYS_AT_ONCE = 16384
"""Few enough to keep intermediate results in the cache of a processor: a tenth faster than all rays at once."""
_HORIZON = -0.02
"""Upward part of the flattest rays that still look for the floor."""
_FADE_FROM, _FADE_TO = 10.0, 26.0
"""Distances between which the floor passes into the backdrop."""
_LIT_BEST_Z = 7.0
_LAMP_FALL_OFF = 60.0

_LAMP, _LAMP_POWER = (1.0, 0.97, 0.91), 0.95
_SKY, _ZENITH, _SKY_POWER = linear(0.78, 0.84, 0.92), linear(0.97, 0.98, 1.0), 0.24
_BOUNCE_POWER = 0.40
_WALL_LOW, _WALL_HIGH = linear(0.66, 0.67, 0.69), linear(0.44, 0.47, 0.52)

# The second is the paint of stripes and spots: a tint of the first, so that the body keeps its color's name.
_PAINTS: Mapping[Color, tuple[Vector, Vector]] = {
    "red": (linear(0.83, 0.08, 0.08), linear(1.0, 0.62, 0.58)),
    "orange": (linear(0.98, 0.48, 0.03), linear(0.60, 0.24, 0.02)),
    "yellow": (linear(0.98, 0.87, 0.08), linear(0.64, 0.50, 0.03)),
    "green": (linear(0.08, 0.60, 0.20), linear(0.64, 0.93, 0.66)),
    "blue": (linear(0.08, 0.26, 0.86), linear(0.58, 0.76, 1.0)),
    "purple": (linear(0.50, 0.14, 0.70), linear(0.84, 0.64, 0.98)),
    "white": (linear(0.97, 0.97, 0.97), linear(0.62, 0.62, 0.64)),
    "black": (linear(0.20, 0.20, 0.21), linear(0.50, 0.50, 0.52)),
}
_STRIPES_A_UNIT, _STRIPE_SHARE, _STRIPE_SLANT = 3.6, 0.42, 0.35
_SPOT_COSINE = 0.935
# A corner of an icosahedron around the origin lies in the direction (SHORT, LONG, 0).
_GOLDEN = (1 + math.sqrt(5)) / 2
_SHORT, _LONG = 1 / math.sqrt(1 + _GOLDEN * _GOLDEN), _GOLDEN / math.sqrt(1 + _GOLDEN * _GOLDEN)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A picture and what can be seen of each body, in the order of the scene."""

    image: NDArray[np.uint8]
    """[size, size, 3], red green blue."""
    boxes: tuple[tuple[float, float, float, float], ...]
    """Left, top, width and height of what is visible, in pixels, to half a pixel; zeros for a hidden body."""
    visible: tuple[float, ...]
    """Share of the silhouette, 0 to 1, that neither other bodies nor the frame hide."""


def render(scene: Scene, size: int) -> Rendering:
    """Draw a scene as a square picture of `size` pixels a side."""
    camera = _Camera.of(scene, size * _SUPERSAMPLING)
    solids = [Solid.of(body) for body in scene.bodies]
    depth = np.full((camera.side, camera.side), np.inf, dtype=np.float32)
    owner = np.full((camera.side, camera.side), -1, dtype=np.int8)
    silhouettes = [_enter(depth, owner, number, solid, camera) for number, solid in enumerate(solids)]

    directions = camera.directions(0, camera.side, 0, camera.side)
    color = np.empty_like(directions)
    bare = np.flatnonzero(owner < 0)
    for part in np.array_split(bare, len(bare) // _RAYS_AT_ONCE + 1):
        color[:, part] = _shade_behind(scene, camera, solids, directions[:, part])
    for number, solid in enumerate(solids):
        seen = np.flatnonzero(owner == number)
        rays = directions[:, seen]
        points = column((0.0, camera.height, 0.0)) + rays * depth.reshape(-1)[seen]
        color[:, seen] = _shade_body(scene, solids, solid, points, rays, mirrors=True)

    masks = [owner == number for number in range(len(solids))]
    return Rendering(
        image=_develop(color, size),
        boxes=tuple(_box(mask) for mask in masks),
        visible=tuple(int(np.count_nonzero(mask)) / whole for mask, whole in zip(masks, silhouettes, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class _Camera:
    height: float
    forward: Vector
    up: Vector
    side: int
    """Subsamples along a side of the picture."""

    @classmethod
    def of(cls, scene: Scene, side: int) -> "_Camera":
        tilt = scene.camera_tilt
        norm = math.sqrt(1 + tilt * tilt)
        forward, up = (0.0, -tilt / norm, 1 / norm), (0.0, 1 / norm, tilt / norm)
        return cls(height=scene.camera_height, forward=forward, up=up, side=side)

    def frame(self, solid: Solid) -> tuple[int, int, int, int]:
        """Top, bottom, left and right subsamples that a solid may cover, in the frame or out of it."""
        x, y, z = solid.center[0], solid.center[1] - self.height, solid.center[2]
        far = y * self.forward[1] + z * self.forward[2]
        right, down = FOCAL_LENGTH * x / far, -FOCAL_LENGTH * (y * self.up[1] + z * self.up[2]) / far
        # The nearest point of the ball around the solid looks largest.
        spread = FOCAL_LENGTH * solid.radius / (far - solid.radius)
        bounds = (down - spread, down + spread, right - spread, right + spread)
        top, bottom, left, end = (math.floor((0.5 + bound) * self.side) for bound in bounds)
        return top, bottom + 1, left, end + 1

    def directions(self, top: int, bottom: int, left: int, right: int) -> Reals:
        """Directions through a rectangle of subsamples, row by row; it may reach out of the frame."""
        across = (np.arange(left, right, dtype=np.float32) + 0.5) * (1 / self.side) - 0.5
        rise = 0.5 - (np.arange(top, bottom, dtype=np.float32) + 0.5) * (1 / self.side)
        x = across * (1 / FOCAL_LENGTH)
        y = self.forward[1] + rise * (self.up[1] / FOCAL_LENGTH)
        z = self.forward[2] + rise * (self.up[2] / FOCAL_LENGTH)
        norm = np.sqrt((x * x)[None, :] + (y * y + z * z)[:, None])
        parts = [x[None, :] / norm, y[:, None] / norm, z[:, None] / norm]
        return np.stack(parts).reshape(3, -1)


def _enter(depth: Reals, owner: NDArray[np.int8], number: int, solid: Solid, camera: _Camera) -> int:
    """Enter one body into the depth and owner maps [S, S]; return the subsamples of its whole silhouette."""
    top, bottom, left, right = camera.frame(solid)
    met = solid.meet(column((0.0, camera.height, 0.0)), camera.directions(top, bottom, left, right))
    met = met.reshape(bottom - top, right - left)
    rows, columns = np.arange(top, bottom), np.arange(left, right)
    inside_rows = (rows >= 0) & (rows < camera.side)
    inside_columns = (columns >= 0) & (columns < camera.side)
    place = np.ix_(rows[inside_rows], columns[inside_columns])
    inside = met[np.ix_(inside_rows, inside_columns)]
    nearer = inside < depth[place]
    depth[place] = np.where(nearer, inside, depth[place])
    owner[place] = np.where(nearer, np.int8(number), owner[place])
    return int(np.count_nonzero(np.isfinite(met)))


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        return (0.0, 0.0, 0.0, 0.0)
    left, right, top, bottom = (
        int(edge) / _SUPERSAMPLING for edge in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)
    )
    return (left, top, right - left, bottom - top)


def _develop(color: Reals, size: int) -> NDArray[np.uint8]:
    """Average the subsamples of each pixel and encode light by a square root, much as sRGB does."""
    # A highlight may exceed the range, but not so far that the edge of its pixels stays jagged.
    grid = np.minimum(color, 1.3).reshape(3, size, 2, size, 2)
    mean = ((grid[:, :, 0, :, 0] + grid[:, :, 0, :, 1]) + (grid[:, :, 1, :, 0] + grid[:, :, 1, :, 1])) * 0.25
    encoded = np.sqrt(np.clip(mean, 0.0, 1.0)) * 255.0 + 0.5
    return np.ascontiguousarray(encoded.astype(np.uint8).transpose(1, 2, 0))


def _shade_body(
    scene: Scene, solids: list[Solid], solid: Solid, points: Reals, directions: Reals, *, mirrors: bool
) -> Reals:
    """Light that points of a body send back along rays; `mirrors` lets a shiny body reflect."""
    others = [other for other in solids if other is not solid]
    local = solid.local(points)
    normals = solid.normals(local)
    paint = _paint(solid, local)

    reaching = _lamp_at(scene, points)
    for other in others:
        reaching *= other.light_past(points, scene.light)
    direct = np.maximum(dot(normals, scene.light), 0.0) * reaching

    # Near the floor a body hides half of the sky and darkens the floor that would light it.
    lift = np.clip(points[1] / (0.35 * solid.scale), 0.0, 1.0)
    openness = 0.4 + 0.6 * lift * (2.0 - lift)
    skyward = 0.5 + 0.5 * normals[1]
    ambient = openness * (0.45 + 0.55 * skyward) * _SKY_POWER
    bounce = openness * (1.0 - skyward) * (_BOUNCE_POWER * scene.brightness)
    light = direct * column(_LAMP) + ambient * column(_SKY) + bounce * _floor_color(scene)
    if solid.body.texture != "shiny" or not mirrors:
        matte: Reals = paint * light
        return matte

    # Flat faces bulge a little in the mirror, lest a whole face flash or stay dull.
    bulging = unit(normals + 0.28 * solid.turned_out(unit(local)))
    towards = np.clip(-dot(directions, bulging), 0.0, 1.0)
    mirrored = unit(directions + bulging * (2.0 * towards))
    gleam = np.maximum(dot(mirrored, scene.light), 0.0)
    highlight = (1.8 * _power(gleam, 6) + 0.12 * _power(gleam, 3)) * reaching
    # More is mirrored at a grazing view: Schlick, "An inexpensive BRDF model for physically-based rendering",
    # Computer Graphics Forum 13, 1994.
    away = 1.0 - towards
    gloss = 0.06 + 0.4 * _power(away, 2) * away + 0.8 * paint
    reflection = _surround(scene, others, points, mirrored)
    polished: Reals = paint * light * 0.55 + reflection * gloss * 0.85 + highlight * column(_LAMP)
    return polished


def _paint(solid: Solid, local: Reals) -> Reals:
    base, tint = (column(paint) for paint in _PAINTS[solid.body.color])
    match solid.body.texture:
        case "striped":
            band = (local[1] + _STRIPE_SLANT * local[0]) * _STRIPES_A_UNIT + 0.2
            marked = band - np.floor(band) < _STRIPE_SHARE
        case "spotted":
            # Spots sit towards the twelve corners of an icosahedron, folded here into one octant.
            x, y, z = np.abs(unit(local))
            nearest = np.maximum(_SHORT * x + _LONG * y, _SHORT * y + _LONG * z)
            marked = np.maximum(nearest, _SHORT * z + _LONG * x) > _SPOT_COSINE
        case "matte" | "shiny":
            return np.broadcast_to(base, local.shape)
    return np.where(marked, tint, base)


def _surround(scene: Scene, others: list[Solid], points: Reals, directions: Reals) -> Reals:
    """What a mirror shows in these directions: the sky, the floor and other bodies."""
    sky = column(_SKY)
    color = mix(sky, column(_ZENITH), np.clip(directions[1], 0.0, 1.0))
    down = np.flatnonzero(directions[1] < _HORIZON)
    distance = np.minimum(np.maximum(points[1, down], 0.0) / -directions[1, down], 40.0)
    landing = points[:, down] + directions[:, down] * distance
    # No mirror here is so smooth that it keeps the finest detail of the floor.
    floor = _shade_floor(scene, others, landing, 0.03 + 0.05 * distance)
    color[:, down] = mix(floor, sky, np.clip(distance / 20.0, 0.0, 1.0))
    nearest = np.full(points.shape[1], np.inf, dtype=np.float32)
    for other in others:
        met = other.meet(points, directions)
        seen = np.flatnonzero(met < nearest)
        nearest[seen] = met[seen]
        rays = directions[:, seen]
        color[:, seen] = _shade_body(scene, others, other, points[:, seen] + rays * met[seen], rays, mirrors=False)
    return color


def _shade_behind(scene: Scene, camera: _Camera, solids: list[Solid], directions: Reals) -> Reals:
    """Light that comes along rays which meet no body: from the floor, or from the wall far behind it."""
    color = _wall(scene, directions[1])
    down = np.flatnonzero(directions[1] < _HORIZON)
    heading = directions[:, down]
    distance = camera.height / -heading[1]
    # A subsample covers the more of the floor, away from the camera, the flatter its ray.
    footprint = distance / (FOCAL_LENGTH * camera.side) / -heading[1]
    floor = _shade_floor(scene, solids, heading * distance + column((0.0, camera.height, 0.0)), footprint)
    fade = np.clip((distance - _FADE_FROM) / (_FADE_TO - _FADE_FROM), 0.0, 1.0)
    color[:, down] = mix(floor, color[:, down], eased(fade))
    return color


def _shade_floor(scene: Scene, solids: list[Solid], points: Reals, footprint: Reals) -> Reals:
    """Light from points of the floor, of which one subsample covers `footprint` [R]."""
    reaching = _lamp_at(scene, points) * np.float32(scene.light[1])
    openness = np.ones_like(reaching)
    for solid in solids:
        reaching *= solid.light_past(points, scene.light)
        openness *= _contact(solid, points)
    light = openness * (reaching * column(_LAMP) + _SKY_POWER * column(_SKY))

    # Each scene shows another part of the floor, laid another way.
    cosine, sine = rotation(scene.hue_shift[0] * 5)
    u = cosine * points[0] - sine * points[2] + scene.hue_shift[1] * 61
    v = sine * points[0] + cosine * points[2] + scene.hue_shift[2] * 47
    shade: Reals = _floor_color(scene) * MATERIALS[scene.floor].relief(u, v, footprint) * light
    return shade


def _contact(solid: Solid, points: Reals) -> Reals:
    """Share [R] of light that a body leaves to points of the floor because it stands near."""
    reach = 0.55 * solid.scale
    limit = solid.radius + reach
    near = np.flatnonzero(length(points[0] - solid.center[0], points[2] - solid.center[2]) < limit)
    nearness = 1.0 - np.clip(solid.gap(points[:, near]) / reach, 0.0, 1.0)
    share = np.ones(points.shape[1], dtype=np.float32)
    share[near] = 1.0 - 0.62 * nearness * nearness
    return share


def _wall(scene: Scene, rise: Reals) -> Reals:
    """Light from the wall, where `rise` [R] is the upward part of the rays; it darkens upwards."""
    height = np.clip(rise * 3.0 + 0.1, 0.0, 1.0)
    return mix(column(_WALL_LOW), column(_WALL_HIGH), height) * column(scene.hue_shift)


def _floor_color(scene: Scene) -> Reals:
    """[3, 1]."""
    return column(MATERIALS[scene.floor].color) * column(scene.hue_shift)


def _lamp_at(scene: Scene, points: Reals) -> Reals:
    """Strength [R] of the lamp, which lights the middle of the ground best."""
    away_z = points[2] - np.float32(_LIT_BEST_Z)
    spread = points[0] * points[0] + away_z * away_z
    strength: Reals = _LAMP_POWER * scene.brightness * _LAMP_FALL_OFF / (_LAMP_FALL_OFF + spread)
    return strength


def _power(x: Reals, doublings: int) -> Reals:
    """`x` [R] to the power of two to the power `doublings`, by squaring."""
    for _ in range(doublings):
        x = x * x
    return x
