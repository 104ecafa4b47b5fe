"""How views of an image are fitted to the encoder's input, and which part of the image a grid covers."""

import io
from typing import get_args

import numpy as np
import pytest
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from pipeline.features.images import read_views, read_visible
from pipeline.features.resnets import RESNETS, Architecture, ClipResNet, TorchvisionResNet, encoder_frame
from pipeline.features.views import Frame, View, relative_box
from tests.image_files import encode_image


def random_png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode_image(Image.fromarray(pixels))


@pytest.mark.parametrize("architecture", get_args(TorchvisionResNet))
def test_recipes_are_those_of_torchvisions_default_weights(architecture: Architecture) -> None:
    recipe = torchvision.models.get_model_weights(architecture).DEFAULT.transforms()
    (size,), (resize_size,) = recipe.crop_size, recipe.resize_size
    crop = RESNETS[architecture].center_crop

    assert crop.scale == resize_size / size
    assert crop.resampling == recipe.interpolation.value == InterpolationMode.BILINEAR.value
    assert RESNETS[architecture].normalization.mean == tuple(recipe.mean)
    assert RESNETS[architecture].normalization.standard_deviation == tuple(recipe.std)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (301, 300), (300, 300), (224, 900)])
@pytest.mark.parametrize("architecture", ["resnet18", "resnext50_32x4d", "RN50"])
def test_a_center_crop_equals_torchvisions(architecture: Architecture, width: int, height: int) -> None:
    content = random_png(width, height)
    is_clip = architecture in get_args(ClipResNet)
    interpolation = InterpolationMode.BICUBIC if is_clip else InterpolationMode.BILINEAR
    side = {"resnet18": 256, "resnext50_32x4d": 232, "RN50": 224}[architecture]
    recipe = transforms.Compose([transforms.Resize(side, interpolation), transforms.CenterCrop(224)])
    expected = np.array(recipe(Image.open(io.BytesIO(content))))

    pixels = read_views(content, encoder_frame(architecture, 224, 224, "center_crop"), ("whole", "whole_flipped"))

    assert np.array_equal(pixels[0], expected)
    assert np.array_equal(pixels[1], expected[:, ::-1])


def test_the_center_of_a_long_image_is_cut_out_before_it_is_resized() -> None:
    """The whole image would be resized to 256 x 5,120,000 px."""
    pixels = np.zeros((1, 20_000, 3), dtype=np.uint8)
    pixels[:, 9_999:10_001] = 255

    view = read_views(Image.fromarray(pixels), encoder_frame("resnet18", 224, 224, "center_crop"), ("whole",))[0]

    assert view.shape == (224, 224, 3)
    assert view.min() > 250


def test_an_input_need_not_be_square() -> None:
    content = random_png(90, 60)

    squashed = read_views(content, Frame(height=32, width=64), ("whole",))
    cropped = read_views(content, encoder_frame("resnet50", 32, 64, "center_crop"), ("whole", "top_left"))

    expected = Image.open(io.BytesIO(content)).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(squashed[0], np.array(expected))
    assert cropped.shape == (2, 32, 64, 3)


@pytest.mark.parametrize("view", ["whole", "whole_flipped", "top_left", "bottom_right_flipped"])
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_the_visible_part_is_the_part_that_is_encoded(resize: str, view: View) -> None:
    """A gradient shows where each pixel comes from."""
    width, height = 240, 160
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    frame = encoder_frame("resnet18", 96, 128, resize)  # type: ignore[arg-type]

    encoded = read_views(image, frame, (view,))[0].astype(float)
    visible = read_visible(image, max_side=200, frame=frame, view=view).astype(float)

    left, top, right, bottom = frame.visible_box(width, height, view)
    assert visible.shape[1] / visible.shape[0] == pytest.approx((right - left) / (bottom - top), abs=0.02)
    for pixels in (encoded, visible):
        columns, rows = pixels[:, :, 0].mean(0), pixels[:, :, 1].mean(1)
        columns = columns[::-1] if view.endswith("flipped") else columns
        assert (columns[0], columns[-1]) == pytest.approx((left, right), abs=2.5)
        assert (rows[0], rows[-1]) == pytest.approx((top, bottom), abs=2.5)


def test_boxes_are_relative_to_the_visible_part() -> None:
    frame = encoder_frame("RN50", 100, 100, "center_crop")
    visible = frame.visible_box(200, 100, "whole")

    assert visible == (50, 0, 150, 100)
    assert relative_box((0.25, 0.5, 0.25, 0.5), visible, 200, 100, "whole") == pytest.approx((0, 0.5, 0.5, 0.5))
    assert relative_box((0.25, 0.5, 0.25, 0.5), visible, 200, 100, "whole_flipped") == pytest.approx(
        (0.5, 0.5, 0.5, 0.5)
    )
