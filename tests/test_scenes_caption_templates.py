import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu

from pipeline.scenes.caption_templates import canonical_caption, sample_captions
from pipeline.scenes.scene import Color, Floor, Scene, SceneObject, Shape, sample_scene


def words(caption: str) -> list[str]:
    return re.findall("[a-z]+", caption.lower())


def center_x(scene: Scene) -> list[float]:
    """Project the centers of all objects; the focal length is 1.8 image widths."""
    return [0.5 + 1.8 * obj.x / obj.z for obj in scene.objects]


def random_scene(rng: np.random.Generator) -> Scene:
    return sample_scene(rng, forbidden=frozenset(), required=None, duplicate_rate=0.35)


def make_object(color: Color, shape: Shape, x: float, z: float) -> SceneObject:
    return SceneObject(shape=shape, color=color, size="large", texture="matte", x=x, z=z, yaw=0.0)


def make_scene(*objects: SceneObject, floor: Floor = "wooden") -> Scene:
    return Scene(
        objects=objects,
        floor=floor,
        tint=(1.0, 1.0, 1.0),
        light_direction=(0.0, 0.8, -0.6),
        light_intensity=1.0,
        camera_height=2.7,
        camera_pitch=0.33,
    )


def bleu4(hypotheses: list[str], references: list[list[str]]) -> float:
    results = {index: [hypothesis] for index, hypothesis in enumerate(hypotheses)}
    scores, _ = Bleu(4).compute_score(dict(enumerate(references)), results, verbose=0)
    return float(scores[3])


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (
            make_scene(make_object("orange", "ring", 0.0, 6.0), floor="sandy"),
            "An orange ring stands alone on the sand.",
        ),
        (
            make_scene(make_object("red", "cube", -1.0, 6.0), make_object("red", "cube", 1.0, 6.0), floor="grassy"),
            "Two red cubes stand by themselves on the grass.",
        ),
        (
            make_scene(make_object("blue", "sphere", 1.0, 6.0), make_object("red", "cube", -1.0, 6.0)),
            "A red cube stands to the left of a blue ball on a wooden floor.",
        ),
        (
            make_scene(make_object("blue", "cone", 0.0, 9.0), make_object("red", "cube", 0.1, 5.5), floor="tiled"),
            "A red cube stands in front of a blue cone on a tiled floor.",
        ),
        (
            make_scene(
                make_object("white", "cone", 1.0, 8.0),
                make_object("black", "pyramid", 0.0, 6.0),
                make_object("black", "pyramid", -1.0, 6.0),
                make_object("green", "cylinder", -1.5, 8.0),
                floor="carpeted",
            ),
            "A green cylinder, two black pyramids and a white cone stand on a carpet.",
        ),
    ],
)
def test_canonical_caption(scene: Scene, caption: str) -> None:
    assert canonical_caption(scene, center_x(scene)) == caption


@given(st.integers(0, 2**32 - 1))
def test_a_scene_has_five_different_captions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    captions = sample_captions(scene, rng, center_x(scene))
    assert len(set(captions)) == 5
    for caption in captions:
        assert re.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)+\.", caption)


def test_captions_are_determined_by_the_seed() -> None:
    scene = random_scene(np.random.default_rng(1))
    first, second, third = (sample_captions(scene, np.random.default_rng(seed), center_x(scene)) for seed in (2, 2, 3))
    assert first == second != third


def test_objects_at_the_same_depth_are_never_in_front_of_or_behind_each_other() -> None:
    scene = make_scene(make_object("blue", "cone", -1.0, 6.0), make_object("red", "cube", 1.0, 6.2))
    rng = np.random.default_rng(0)
    captions = {caption for _ in range(100) for caption in sample_captions(scene, rng, center_x(scene))}
    assert not any("front" in caption or "behind" in caption for caption in captions)
    assert any("to the left of" in caption for caption in captions)


@pytest.mark.slow
def test_bleu_of_canonical_captions_and_of_annotators_against_each_other() -> None:
    hypotheses, references = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = random_scene(rng)
        hypotheses.append(" ".join(words(canonical_caption(scene, center_x(scene)))))
        references.append([" ".join(words(caption)) for caption in sample_captions(scene, rng, center_x(scene))])
    assert 0.90 < bleu4(hypotheses, references) < 0.97
    leave_one_out = [
        bleu4([captions[i] for captions in references], [captions[:i] + captions[i + 1 :] for captions in references])
        for i in range(5)
    ]
    assert 0.65 < np.mean(leave_one_out) < 0.80

    vocabulary = Counter(word for captions in references for caption in captions for word in caption.split())
    lengths = [len(caption.split()) for captions in references for caption in captions]
    assert 70 <= len(vocabulary) <= 110
    assert 11 < np.mean(lengths) < 16
    assert max(lengths) <= 26
