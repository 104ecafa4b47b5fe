import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu

from pipeline.scenes.caption_templates import canonical_caption, captions
from pipeline.scenes.scene import Body, Color, Floor, Scene, Shape, draw_scene

WORD = re.compile("[a-z]+")


def words(caption: str) -> list[str]:
    return WORD.findall(caption.lower())


def across(scene: Scene) -> list[float]:
    return [0.5 + 1.8 * body.x / body.z for body in scene.bodies]


def body(color: Color, shape: Shape, x: float, z: float) -> Body:
    return Body(shape=shape, color=color, size="large", texture="matte", x=x, z=z, turn=0.0)


def scene_of(*bodies: Body, floor: Floor = "wooden") -> Scene:
    return Scene(
        bodies=bodies,
        floor=floor,
        hue_shift=(1.0, 1.0, 1.0),
        light=(0.0, 0.8, -0.6),
        brightness=1.0,
        camera_height=2.7,
        camera_tilt=0.33,
    )


def bleu4(hypotheses: list[str], references: list[list[str]]) -> float:
    told = {place: [hypothesis] for place, hypothesis in enumerate(hypotheses)}
    scores, _ = Bleu(4).compute_score(dict(enumerate(references)), told, verbose=0)
    return float(scores[3])


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (
            scene_of(body("orange", "ring", 0.0, 6.0), floor="sandy"),
            "An orange ring stands alone on the sand.",
        ),
        (
            scene_of(body("red", "cube", -1.0, 6.0), body("red", "cube", 1.0, 6.0), floor="grassy"),
            "Two red cubes stand by themselves on the grass.",
        ),
        (
            scene_of(body("blue", "sphere", 1.0, 6.0), body("red", "cube", -1.0, 6.0)),
            "A red cube stands to the left of a blue ball on a wooden floor.",
        ),
        (
            scene_of(body("blue", "cone", 0.0, 9.0), body("red", "cube", 0.1, 5.5), floor="tiled"),
            "A red cube stands in front of a blue cone on a tiled floor.",
        ),
        (
            scene_of(
                body("white", "cone", 1.0, 8.0),
                body("black", "pyramid", 0.0, 6.0),
                body("black", "pyramid", -1.0, 6.0),
                body("green", "cylinder", -1.5, 8.0),
                floor="carpeted",
            ),
            "A green cylinder, two black pyramids and a white cone stand on a carpet.",
        ),
    ],
)
def test_the_canonical_caption_tells_objects_from_left_to_right(scene: Scene, caption: str) -> None:
    assert canonical_caption(scene, across(scene)) == caption


@given(st.integers(0, 2**32 - 1))
def test_captions_are_five_different_sentences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng, forbidden=frozenset(), required=None, duplicate_rate=0.35)
    told = captions(scene, rng, across(scene))
    assert len(set(told)) == 5
    for caption in told:
        assert re.fullmatch(r"[A-Z][a-z]*(,? [a-z]+)+\.", caption)


def test_the_generator_alone_decides_the_wording() -> None:
    scene = draw_scene(np.random.default_rng(1), forbidden=frozenset(), required=None, duplicate_rate=0.35)
    first, again, other = (captions(scene, np.random.default_rng(s), across(scene)) for s in (2, 2, 3))
    assert first == again != other


def test_neighbors_at_one_distance_are_never_told_to_be_before_each_other() -> None:
    scene = scene_of(body("blue", "cone", -1.0, 6.0), body("red", "cube", 1.0, 6.2))
    rng = np.random.default_rng(0)
    told = {caption for _ in range(100) for caption in captions(scene, rng, across(scene))}
    assert not any("front" in caption or "behind" in caption for caption in told)
    assert any("to the left of" in caption for caption in told)


def test_a_captioner_that_sees_all_scores_high_and_annotators_agree_in_part() -> None:
    hypotheses, references = [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, forbidden=frozenset(), required=None, duplicate_rate=0.35)
        hypotheses.append(" ".join(words(canonical_caption(scene, across(scene)))))
        references.append([" ".join(words(caption)) for caption in captions(scene, rng, across(scene))])
    assert 0.90 < bleu4(hypotheses, references) < 0.97
    among = np.mean([bleu4([r[k] for r in references], [r[:k] + r[k + 1 :] for r in references]) for k in range(5)])
    assert 0.65 < among < 0.80

    told = Counter(word for five in references for caption in five for word in caption.split())
    lengths = [len(caption.split()) for five in references for caption in five]
    assert 70 <= len(told) <= 110
    assert 11 < np.mean(lengths) < 16
    assert max(lengths) <= 26
