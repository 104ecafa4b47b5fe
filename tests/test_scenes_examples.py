from dataclasses import replace

import numpy as np
import pytest

from pipeline.scenes.examples import (
    ATTRIBUTES,
    BACKGROUND,
    IGNORE,
    SamplingSpec,
    center_cell,
    object_labels,
    sample_example,
    sample_examples,
)
from pipeline.scenes.scene import SceneObject

HELD_OUT = (("red", "sphere"), ("blue", "cube"))
SPEC = SamplingSpec(seed=3, image_size=64, stride=16, held_out=HELD_OUT)


def test_labels_are_one_plus_the_index_of_the_value():
    obj = SceneObject(shape="cube", color="red", size="large", texture="matte", x=0.0, z=7.0, yaw=0.0)
    assert object_labels(obj) == [2, 1, 2, 1]


def test_center_cell_is_row_and_column():
    assert center_cell((30.0, 8.0, 4.0, 4.0), stride=16) == (0, 2)


@pytest.mark.slow
def test_held_out_pairs_occur_in_every_second_test_example_only():
    def has_held_out(split, index) -> bool:
        objects = sample_example(SPEC, split, index).scene.objects
        return any((obj.color, obj.shape) in HELD_OUT for obj in objects)

    assert not any(has_held_out("train", index) for index in range(40))
    assert [has_held_out("test", index) for index in range(8)] == [False, True] * 4


@pytest.mark.slow
def test_cells_have_the_label_of_the_nearest_object():
    spec = replace(SPEC, image_size=128)
    for index in range(12):
        example = sample_example(spec, "train", index)
        objects = example.scene.objects
        nearest, box = min(zip(objects, example.boxes, strict=True), key=lambda pair: pair[0].z)
        assert example.labels[(slice(None), *center_cell(box, spec.stride))].tolist() == object_labels(nearest)
        # The top row is above the horizon and shows the backdrop.
        assert (example.labels[:, 0] == BACKGROUND).all()
        labels = [set(example.labels[i].flat) - {BACKGROUND, IGNORE} for i in range(len(ATTRIBUTES))]
        expected = [set(values) for values in zip(*map(object_labels, objects), strict=True)]
        assert labels == expected


@pytest.mark.slow
def test_examples_do_not_depend_on_the_process():
    for index, example in enumerate(sample_examples(SPEC, "train", 3, num_workers=2)):
        expected = sample_example(SPEC, "train", index)
        assert np.array_equal(example.image, expected.image)
        assert np.array_equal(example.labels, expected.labels)
