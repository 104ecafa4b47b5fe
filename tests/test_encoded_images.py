"""Images prepared for decoding: position encoding, and context vectors in both forms."""

import pytest
import torch
from torch import nn

from pipeline.decoder.encoded_images import ProjectedRegions, RegionFeatures, encode_images, position_encoding

B, K, P, D = 3, 2, 6, 5


def test_position_encodings_are_distinct_and_closer_for_closer_regions() -> None:
    encoding = position_encoding(7, 5)
    distances = torch.cdist(encoding, encoding)
    assert distances.shape == (35, 35)
    assert (distances + 9 * torch.eye(35)).min() > 0.3
    assert distances[0, 1] < distances[0, 2] < distances[0, 34]


@pytest.mark.parametrize(("num_steps", "form"), [(0, RegionFeatures), (P, RegionFeatures), (P + 1, ProjectedRegions)])
def test_every_form_projects_context_vectors(num_steps: int, form: type) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(D, 4, bias=False), nn.Linear(D, 7, bias=False)]
    regions, alpha, index = torch.rand(B, P, D), torch.rand(2, K, P), torch.tensor([2, 0])
    images = encode_images(torch.rand(B, 1, 3), torch.rand(B, P, 4), regions, layers, num_steps).select_images(index)
    assert type(images) is form
    for layer, weight in zip(layers, images.context_weights(layers), strict=True):
        torch.testing.assert_close(images.attend(alpha) @ weight, layer(alpha @ regions[index]))
