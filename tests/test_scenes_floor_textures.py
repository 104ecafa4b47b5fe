import numpy as np
import pytest

from pipeline.scenes.floor_textures import FLOOR_TEXTURES, linear_rgb
from pipeline.scenes.scene import FLOORS


def coordinates(num_points: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.random.default_rng(0).uniform(-20, 20, (2, num_points)).astype(np.float32)
    return u, v


@pytest.mark.parametrize("floor", FLOORS)
def test_patterns_modulate_the_albedo_around_its_mean(floor):
    u, v = coordinates()
    pattern = FLOOR_TEXTURES[floor].pattern(u, v, np.full_like(u, 0.01))
    assert pattern.dtype == np.float32
    assert pattern.min() > 0
    assert pattern.mean() == pytest.approx(1, abs=0.2)
    assert pattern.std() > 0.03


@pytest.mark.parametrize("floor", FLOORS)
def test_patterns_lose_contrast_with_a_large_footprint(floor):
    u, v = coordinates()
    fine, coarse = (FLOOR_TEXTURES[floor].pattern(u, v, np.full_like(u, width)) for width in (0.01, 1.0))
    assert coarse.std() < fine.std()


def test_linear_rgb_inverts_the_square_root_of_the_display_encoding():
    assert np.sqrt(linear_rgb(0.2, 0.5, 1.0)).tolist() == pytest.approx([0.2, 0.5, 1.0])
