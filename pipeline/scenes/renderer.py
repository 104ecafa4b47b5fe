"""Renderer of scenes: a small ray tracer whose pixels are the same on every machine.

Objects are lit by a key light with soft shadows, by the sky and by light that the floor reflects. Shiny objects reflect
each other and the floor. Pixels are computed only by operations that IEEE 754 defines exactly (`+ - * /`, square root,
floor, comparison) and by integer hashes. Sines, powers and matrix products are avoided: their last bit depends on the
library and the processor.

The camera is at (0, `camera_height`, 0) and faces +z, with a field of view of 31 degrees. At the distances of
`sample_scene`, a large object is 42 to 24 px high in an image of 128 px, and a small one 23 to 13.

R rays or points in a flat array, S subsamples along a side of the image, H and W height and width of a rectangle of
subsamples. Points, directions and colors are float32 [3, R]. Colors are linear light; 1 is the brightest displayable
value.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.scenes.distance_fields import ObjectField, rotation
from pipeline.scenes.floor_textures import FLOOR_TEXTURES, linear_rgb
from pipeline.scenes.scene import Color, Scene
from pipeline.scenes.vectors import FloatArray, Vector, column, dot, length, mix, normalize, smoothstep

Box = tuple[float, float, float, float]
"""Left, top, width and height in px."""

FOCAL_LENGTH = 1.8
"""In image widths."""

_SUPERSAMPLING = 2  # Subsamples per pixel along each side; _to_pixels averages exactly four.
_POINTS_PER_CHUNK = 16384
"""Small enough for the intermediate results of a texture to stay in the processor's cache."""
_HORIZON = -0.02
"""Rays whose y direction is above this never reach the floor."""
_FADE_START, _FADE_END = 10.0, 26.0
"""Distances between which the floor fades into the backdrop."""
_LIGHT_CENTER_Z = 7.0
_LIGHT_FALLOFF = 60.0
"""Squared distance from the center of the light at which it has half its power."""
_MAX_REFLECTION_DISTANCE = 40.0

_LIGHT_COLOR, _LIGHT_POWER = (1.0, 0.97, 0.91), 0.95
_SKY_COLOR, _ZENITH_COLOR, _SKY_POWER = linear_rgb(0.78, 0.84, 0.92), linear_rgb(0.97, 0.98, 1.0), 0.24
_FLOOR_BOUNCE_POWER = 0.40
_BACKDROP_BOTTOM, _BACKDROP_TOP = linear_rgb(0.66, 0.67, 0.69), linear_rgb(0.44, 0.47, 0.52)

# Base color, and color of stripes and spots: a tint of the base color, so that the object's color remains unambiguous.
_ALBEDOS: Mapping[Color, tuple[Vector, Vector]] = {
    "red": (linear_rgb(0.83, 0.08, 0.08), linear_rgb(1.0, 0.62, 0.58)),
    "orange": (linear_rgb(0.98, 0.48, 0.03), linear_rgb(0.60, 0.24, 0.02)),
    "yellow": (linear_rgb(0.98, 0.87, 0.08), linear_rgb(0.64, 0.50, 0.03)),
    "green": (linear_rgb(0.08, 0.60, 0.20), linear_rgb(0.64, 0.93, 0.66)),
    "blue": (linear_rgb(0.08, 0.26, 0.86), linear_rgb(0.58, 0.76, 1.0)),
    "purple": (linear_rgb(0.50, 0.14, 0.70), linear_rgb(0.84, 0.64, 0.98)),
    "white": (linear_rgb(0.97, 0.97, 0.97), linear_rgb(0.62, 0.62, 0.64)),
    "black": (linear_rgb(0.20, 0.20, 0.21), linear_rgb(0.50, 0.50, 0.52)),
}
_STRIPE_FREQUENCY, _STRIPE_WIDTH, _STRIPE_SLANT = 3.6, 0.42, 0.35
_SPOT_COSINE = 0.935
# A vertex of an icosahedron around the origin lies in the direction (_SHORT, _LONG, 0).
_GOLDEN = (1 + math.sqrt(5)) / 2
_SHORT, _LONG = 1 / math.sqrt(1 + _GOLDEN * _GOLDEN), _GOLDEN / math.sqrt(1 + _GOLDEN * _GOLDEN)


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """An image with the bounding box and the visibility of each object, in the order of the scene."""

    image: NDArray[np.uint8]
    """RGB [image_size, image_size, 3]."""
    boxes: tuple[Box, ...]
    """Bounding boxes of the visible parts, to half a pixel; zeros for a hidden object."""
    visibility: tuple[float, ...]
    """Fraction of each silhouette, 0 to 1, that is inside the frame and not hidden by other objects."""


def render(scene: Scene, image_size: int) -> Rendering:
    """Render a scene as a square image of `image_size` px."""
    camera = _Camera.from_scene(scene, image_size * _SUPERSAMPLING)
    fields = [ObjectField.from_object(scene_object) for scene_object in scene.objects]
    depth = np.full((camera.side, camera.side), np.inf, dtype=np.float32)  # [S, S]
    object_index = np.full((camera.side, camera.side), -1, dtype=np.int8)  # [S, S], -1 for the background
    silhouette_sizes = [_rasterize(depth, object_index, index, field, camera) for index, field in enumerate(fields)]
    masks = [object_index == index for index in range(len(fields))]

    directions = camera.directions(0, camera.side, 0, camera.side)  # [3, S * S]
    color = _shade_background(scene, camera, fields, directions)  # [3, S * S]
    for field, mask in zip(fields, masks, strict=True):
        rays = np.flatnonzero(mask)
        ray_directions = directions.take(rays, axis=1)
        points = column((0.0, camera.height, 0.0)) + ray_directions * depth.take(rays)
        color[:, rays] = _shade_object(scene, fields, field, points, ray_directions, reflections=True)

    return Rendering(
        image=_to_pixels(color, image_size),
        boxes=tuple(_bounding_box(mask) for mask in masks),
        visibility=tuple(
            int(np.count_nonzero(mask)) / size for mask, size in zip(masks, silhouette_sizes, strict=True)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Camera:
    """A pinhole camera at x = z = 0."""

    height: float
    forward: Vector
    up: Vector
    side: int
    """Subsamples along a side of the image, S."""

    @classmethod
    def from_scene(cls, scene: Scene, side: int) -> "_Camera":
        pitch = scene.camera_pitch
        norm = math.sqrt(1 + pitch * pitch)
        forward, up = (0.0, -pitch / norm, 1 / norm), (0.0, 1 / norm, pitch / norm)
        return cls(height=scene.camera_height, forward=forward, up=up, side=side)

    def project_bounds(self, field: ObjectField) -> tuple[int, int, int, int]:
        """Return top, bottom, left and right of the subsamples around an object, not clipped to the frame."""
        x, y, z = field.center[0], field.center[1] - self.height, field.center[2]
        depth = y * self.forward[1] + z * self.forward[2]
        center_x, center_y = FOCAL_LENGTH * x / depth, -FOCAL_LENGTH * (y * self.up[1] + z * self.up[2]) / depth
        # The nearest point of the bounding sphere has the largest projection.
        radius = FOCAL_LENGTH * field.bounding_radius / (depth - field.bounding_radius)
        bounds = (center_y - radius, center_y + radius, center_x - radius, center_x + radius)
        top, bottom, left, right = (math.floor((0.5 + bound) * self.side) for bound in bounds)
        return top, bottom + 1, left, right + 1

    def directions(self, top: int, bottom: int, left: int, right: int) -> FloatArray:
        """Return ray directions [3, H * W] through a rectangle of subsamples, row by row."""
        image_x = (np.arange(left, right, dtype=np.float32) + 0.5) * (1 / self.side) - 0.5
        image_y = 0.5 - (np.arange(top, bottom, dtype=np.float32) + 0.5) * (1 / self.side)
        x = image_x * (1 / FOCAL_LENGTH)
        y = self.forward[1] + image_y * (self.up[1] / FOCAL_LENGTH)
        z = self.forward[2] + image_y * (self.up[2] / FOCAL_LENGTH)
        norm = np.sqrt((x * x)[None, :] + (y * y + z * z)[:, None])  # [H, W]
        components = [x[None, :] / norm, y[:, None] / norm, z[:, None] / norm]
        return np.stack(components).reshape(3, -1)


def _rasterize(
    depth: FloatArray, object_index: NDArray[np.int8], index: int, field: ObjectField, camera: _Camera
) -> int:
    """Draw an object into the depth buffer and the index buffer.

    Args:
        depth: Distance of the nearest object along the ray of each subsample [S, S]; updated.
        object_index: Index of that object [S, S]; updated.
        index: Index of the object.
        field: Field of the object.
        camera: The camera.

    Returns:
        Number of subsamples in the entire silhouette, including hidden parts and parts outside the frame.
    """
    top, bottom, left, right = camera.project_bounds(field)
    hits = field.intersect(column((0.0, camera.height, 0.0)), camera.directions(top, bottom, left, right))
    hits = hits.reshape(bottom - top, right - left)  # [H, W]
    rows, columns = (slice(*np.clip((start, stop), 0, camera.side)) for start, stop in ((top, bottom), (left, right)))
    hits_in_frame = hits[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    is_nearer = hits_in_frame < depth[rows, columns]
    object_index[rows, columns][is_nearer] = index
    np.minimum(depth[rows, columns], hits_in_frame, out=depth[rows, columns])
    return int(np.count_nonzero(np.isfinite(hits)))


def _bounding_box(mask: NDArray[np.bool_]) -> Box:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if len(columns) == 0:
        return (0.0, 0.0, 0.0, 0.0)
    left, right, top, bottom = (
        int(edge) / _SUPERSAMPLING for edge in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)
    )
    return (left, top, right - left, bottom - top)


def _to_pixels(color: FloatArray, image_size: int) -> NDArray[np.uint8]:
    """Average the subsamples of each pixel and encode linear light by a square root (gamma 2, close to sRGB)."""
    # Highlights may exceed 1, but are limited so that the edges of their pixels stay antialiased.
    subsamples = np.minimum(color, 1.3).reshape(3, image_size, 2, image_size, 2)
    upper = subsamples[:, :, 0, :, 0] + subsamples[:, :, 0, :, 1]
    lower = subsamples[:, :, 1, :, 0] + subsamples[:, :, 1, :, 1]
    mean = (upper + lower) * 0.25  # [3, image_size, image_size]
    encoded = np.sqrt(np.clip(mean, 0.0, 1.0)) * 255.0 + 0.5
    return np.ascontiguousarray(encoded.astype(np.uint8).transpose(1, 2, 0))


def _shade_object(
    scene: Scene,
    fields: list[ObjectField],
    field: ObjectField,
    points: FloatArray,
    directions: FloatArray,
    *,
    reflections: bool,
) -> FloatArray:
    """Shade points of an object.

    Args:
        scene: The scene.
        fields: Fields of all objects that cast shadows or are reflected.
        field: Field of the object.
        points: World points [3, R] on its surface.
        directions: Directions [3, R] of the rays that hit the points.
        reflections: Whether a shiny object reflects its surroundings; otherwise it is shaded as matte.

    Returns:
        Colors [3, R].
    """
    others = [other for other in fields if other is not field]
    local_points = field.to_object_space(points)
    normals = field.normals(local_points)
    albedo = _albedo(field, local_points)

    incoming = _light_power(scene, points)
    for other in others:
        incoming *= other.soft_shadow(points, scene.light_direction)
    direct = np.maximum(dot(normals, scene.light_direction), 0.0) * incoming

    # Near the floor, the object itself occludes half of the sky and shadows the floor.
    lift = np.clip(points[1] / (0.35 * field.scale), 0.0, 1.0)
    occlusion = 0.4 + 0.6 * lift * (2.0 - lift)
    sky_share = 0.5 + 0.5 * normals[1]
    ambient = occlusion * (0.45 + 0.55 * sky_share) * _SKY_POWER
    bounce = occlusion * (1.0 - sky_share) * (_FLOOR_BOUNCE_POWER * scene.light_intensity)
    light = direct * column(_LIGHT_COLOR) + ambient * column(_SKY_COLOR) + bounce * _floor_albedo(scene)
    if field.scene_object.texture != "shiny" or not reflections:
        diffuse: FloatArray = albedo * light
        return diffuse

    # Reflections use slightly rounded normals, so that a flat face is not uniformly bright or dark.
    rounded_normals = normalize(normals + 0.28 * field.rotate_to_world(normalize(local_points)))
    cosine = np.clip(-dot(directions, rounded_normals), 0.0, 1.0)
    reflected_directions = normalize(directions + rounded_normals * (2.0 * cosine))
    light_cosine = np.maximum(dot(reflected_directions, scene.light_direction), 0.0)
    specular = (1.8 * _repeated_square(light_cosine, 6) + 0.12 * _repeated_square(light_cosine, 3)) * incoming
    # Reflectance increases at grazing angles: Schlick, "An inexpensive BRDF model for physically-based rendering",
    # Computer Graphics Forum 13, 1994.
    grazing = 1.0 - cosine
    reflectance = 0.06 + 0.4 * _repeated_square(grazing, 2) * grazing + 0.8 * albedo
    reflected = _trace_reflections(scene, others, points, reflected_directions)
    shiny: FloatArray = albedo * light * 0.55 + reflected * reflectance * 0.85 + specular * column(_LIGHT_COLOR)
    return shiny


def _albedo(field: ObjectField, local_points: FloatArray) -> FloatArray:
    """Return the albedo [3, R] of surface points [3, R] of object space."""
    base, accent = (column(albedo) for albedo in _ALBEDOS[field.scene_object.color])
    match field.scene_object.texture:
        case "striped":
            phase = (local_points[1] + _STRIPE_SLANT * local_points[0]) * _STRIPE_FREQUENCY + 0.2
            is_accent = phase - np.floor(phase) < _STRIPE_WIDTH
        case "spotted":
            # Spots are centered on the twelve vertices of an icosahedron, which symmetry folds into one octant.
            x, y, z = np.abs(normalize(local_points))
            cosine = np.maximum(_SHORT * x + _LONG * y, _SHORT * y + _LONG * z)
            is_accent = np.maximum(cosine, _SHORT * z + _LONG * x) > _SPOT_COSINE
        case "matte" | "shiny":
            return np.broadcast_to(base, local_points.shape)
    return np.where(is_accent, accent, base)


def _trace_reflections(
    scene: Scene, fields: list[ObjectField], points: FloatArray, directions: FloatArray
) -> FloatArray:
    """Return the colors [3, R] of the sky, the floor and other objects along reflected rays."""
    sky = column(_SKY_COLOR)
    color = mix(sky, column(_ZENITH_COLOR), np.clip(directions[1], 0.0, 1.0))
    down = np.flatnonzero(directions[1] < _HORIZON)
    distance = np.minimum(np.maximum(points[1, down], 0.0) / -directions[1, down], _MAX_REFLECTION_DISTANCE)
    floor_points = points[:, down] + directions[:, down] * distance
    # The wide footprint blurs the floor, as in an imperfect mirror.
    floor = _shade_floor(scene, fields, floor_points, 0.03 + 0.05 * distance)
    color[:, down] = mix(floor, sky, np.clip(distance / 20.0, 0.0, 1.0))
    nearest = np.full(points.shape[1], np.inf, dtype=np.float32)
    for field in fields:
        hits = field.intersect(points, directions)
        rays = np.flatnonzero(hits < nearest)
        nearest[rays] = hits[rays]
        ray_directions = directions[:, rays]
        hit_points = points[:, rays] + ray_directions * hits[rays]
        color[:, rays] = _shade_object(scene, fields, field, hit_points, ray_directions, reflections=False)
    return color


def _shade_background(scene: Scene, camera: _Camera, fields: list[ObjectField], directions: FloatArray) -> FloatArray:
    """Return the colors [3, R] of the backdrop and the floor along all camera rays, row by row from the top.

    Rays that hit an object are shaded, too: gathering the others would take longer.
    """
    is_floor = directions[1] < _HORIZON
    first = int(np.argmax(is_floor))  # All rays before this one reach the backdrop only.
    slope: FloatArray = np.maximum(-directions[1, first:], -_HORIZON)
    distance: FloatArray = camera.height / slope
    # The flatter the ray, the longer the footprint of a subsample on the floor.
    footprint = distance / (FOCAL_LENGTH * camera.side) / slope
    points = directions[:, first:] * distance + column((0.0, camera.height, 0.0))
    floor = _shade_floor(scene, fields, points, footprint)
    color = _backdrop(scene, directions[1])
    backdrop = color[:, first:]
    fade = np.clip((distance - _FADE_START) / (_FADE_END - _FADE_START), 0.0, 1.0)
    np.copyto(backdrop, mix(floor, backdrop, smoothstep(fade)), where=is_floor[first:])
    return color


def _shade_floor(scene: Scene, fields: list[ObjectField], points: FloatArray, footprint: FloatArray) -> FloatArray:
    """Shade points [3, R] of the floor; `footprint` [R] is the width of a subsample on it."""
    incoming = _light_power(scene, points) * np.float32(scene.light_direction[1])
    visibility = np.ones_like(incoming)
    for field in fields:
        incoming *= field.soft_shadow(points, scene.light_direction)
        visibility *= _contact_shadow(field, points)

    # The texture is rotated and shifted from scene to scene.
    cosine, sine = rotation(scene.tint[0] * 5)
    color = np.empty_like(points)
    for start in range(0, points.shape[1], _POINTS_PER_CHUNK):
        chunk = slice(start, start + _POINTS_PER_CHUNK)
        x, _, z = points[:, chunk]
        u = cosine * x - sine * z + scene.tint[1] * 61
        v = sine * x + cosine * z + scene.tint[2] * 47
        albedo = _floor_albedo(scene) * FLOOR_TEXTURES[scene.floor].pattern(u, v, footprint[chunk])
        light = visibility[chunk] * (incoming[chunk] * column(_LIGHT_COLOR) + _SKY_POWER * column(_SKY_COLOR))
        color[:, chunk] = albedo * light
    return color


def _contact_shadow(field: ObjectField, points: FloatArray) -> FloatArray:
    """Return the fraction [R] of light that reaches floor points near an object (ambient occlusion)."""
    max_distance = 0.55 * field.scale
    max_radius = field.bounding_radius + max_distance
    near = np.flatnonzero(length(points[0] - field.center[0], points[2] - field.center[2]) < max_radius)
    proximity = 1.0 - np.clip(field.distance(points[:, near]) / max_distance, 0.0, 1.0)
    visibility = np.ones(points.shape[1], dtype=np.float32)
    visibility[near] = 1.0 - 0.62 * proximity * proximity
    return visibility


def _backdrop(scene: Scene, direction_y: FloatArray) -> FloatArray:
    """Return the colors [3, R] of the backdrop, a vertical gradient, along rays with these y directions [R]."""
    t = np.clip(direction_y * 3.0 + 0.1, 0.0, 1.0)
    return mix(column(_BACKDROP_BOTTOM), column(_BACKDROP_TOP), t) * column(scene.tint)


def _floor_albedo(scene: Scene) -> FloatArray:
    """Return the mean albedo of the floor, [3, 1]."""
    return column(FLOOR_TEXTURES[scene.floor].albedo) * column(scene.tint)


def _light_power(scene: Scene, points: FloatArray) -> FloatArray:
    """Return the power [R] of the light at points; it is highest at the center of the floor."""
    z_offset = points[2] - np.float32(_LIGHT_CENTER_Z)
    distance_squared = points[0] * points[0] + z_offset * z_offset
    power: FloatArray = _LIGHT_POWER * scene.light_intensity * _LIGHT_FALLOFF / (_LIGHT_FALLOFF + distance_squared)
    return power


def _repeated_square(x: FloatArray, num_squarings: int) -> FloatArray:
    """Raise `x` [R] to the power of 2 ** `num_squarings`."""
    for _ in range(num_squarings):
        x = x * x
    return x
