import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from playwright.sync_api import Browser, Locator, Page

from pipeline.captions.records import AnnotatedObject, Record
from pipeline.generation.caption_io import GeneratedCaptions, RankedCaption
from pipeline.report.examples import LONGER_SIDE, Example, ReportParams, choose, examples
from pipeline.report.report import Report, write_report
from pipeline.report.svg_charts import charts

PHOTOGRAPHS = Path(__file__).parents[2] / "shared/real/coco/images"
GRID = (4, 6)
# Of each word: row and column of its strongest region.
PEAKS = {"a": (0, 0), "red": (3, 1), "</script><b>ball": (1, 4)}
REFERENCE = 'A <ball> & "more" </script><img src=x onerror=alert(1)>'
GRAY = np.full((160, 240, 3), 128, dtype=np.uint8)
# Of a screenshot: beyond, the card's round corners show.
INSIDE = (slice(12, -12), slice(12, -12))
WITHOUT_MOTION = {"reduced_motion": "reduce", "offline": True}


def peaked(*peaks: tuple[int, int]) -> np.ndarray:
    """Attention [T, 4, 6], of which each word's strongest region gets a good half."""
    attention = np.full((len(peaks), *GRID), 0.02)
    for index, (row, column) in enumerate(peaks):
        attention[index, row, column] = 0.54
    return attention


def one_example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "image_id": 7,
        "choice": "best",
        "picture": GRAY,
        "words": tuple(PEAKS),
        "attention": peaked(*PEAKS.values()),
        "references": (REFERENCE, "A second one"),
        "scores": {"CIDEr-D": 1.25, "ROUGE-L": 0.5},
        "boxes": {1: [(0.5, 0.25, 0.25, 0.5)]},
    }
    return Example(**values | changes)


def one_report(**changes: Any) -> Report:
    silent = one_example(choice="random", image_id=9, words=(), attention=np.zeros((0, *GRID)), boxes={})
    looked = {"words": 4, "peak_in_box": 0.75, "chance": 0.125, "mass_in_box": 0.5, "mass_by_chance": 0.0625}
    values: dict[str, Any] = {
        "split": "test",
        "examples": [one_example(), one_example(choice="random", image_id=8), silent],
        "scores": {
            "images": 40,
            "BLEU-4": 0.3125,
            "subsets": {"seen": {"images": 30, "BLEU-4": 0.25}},
            "intervals": {"BLEU-4": [0.29, 0.3333], "subsets": {"seen": {"BLEU-4": [0.2, 0.3]}}},
            "protocol": {"BLEU-4": ["n: 4", "tokens: <plain>"], "intervals": ["intervals: 95%"]},
            "unavailable": {"METEOR": ["no java"]},
        },
        "captions": {
            "diversity": {
                "generated": {"distinct": 12},
                "reference": {"distinct": 39},
                "protocol": ["distinct: of all"],
            },
            "human_agreement": {
                "images": 40,
                "BLEU-4": {"human": [0.2, 0.1, 0.3], "model": [0.4, 0.3, 0.5], "model - human": [0.2, 0.15, 0.25]},
                "protocol": ["human: each"],
            },
        },
        "teacher_forcing": {"words": 100, "loss": 2.0625, "protocol": ["loss: nats"]},
        "scenes": {"images": 40, "attention": {"relation": looked}, "protocol": {"attention": ["peak: center"]}},
        "history": [
            {"epoch": 1, "train_loss": 4.0, "val_loss": 5.0, "val_bleu4": None},
            {"epoch": 2, "train_loss": 2.0, "val_loss": 3.0, "val_bleu4": 0.125},
        ],
        "params": {"dataset": {"root": "/home/someone/flickr8k"}, "train": {"decoder": {"state": 256}, "seed": 1}},
    }
    return Report(**values | changes)


def shown_of(images: Path, file: str, *things: AnnotatedObject, view: str = "whole") -> list[Example]:
    """The one image of a split, whose caption is "a cube", as the worst of all."""
    record = Record(image_id=3, file=file, split="test", captions=("A cube.",), objects=things)
    found = RankedCaption(words=("a", "cube"), log_probability=-1.0, score=-1.0)
    caption = GeneratedCaptions(image_id=3, captions=(found,), attention=peaked((0, 0), (1, 1)))
    params = ReportParams(best=0, worst=1, random=1)
    return examples([record], {3: caption}, {3: {"CIDEr-D": 0.0}}, GRID, view, images, params, seed=1)


class Reader(HTMLParser):
    """Tags with their attributes, and all text, as a browser parses them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, one_report())
    return path


@pytest.fixture
def page(chromium: Browser, path: Path) -> Iterator[Page]:
    with chromium.new_context(**WITHOUT_MOTION, viewport={"width": 1000, "height": 900}) as context:
        page = context.new_page()
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: errors.append(message.text))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        yield page
        assert errors == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


def pixels(card: Locator) -> np.ndarray:
    """The card's picture as it shows, without text and boxes: [H, W, 3]."""
    shot = card.locator(".picture").screenshot(style=".told, .boxes { visibility: hidden }")
    with Image.open(io.BytesIO(shot)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def hot_spot(shown: np.ndarray) -> tuple[float, float]:
    """Middle of what is brightest, as fractions of height and width."""
    light = np.zeros(shown.shape[:2])
    light[INSIDE] = shown[INSIDE].mean(axis=-1)
    rows, columns = np.nonzero(light >= np.quantile(light, 0.995))
    return float(rows.mean() + 0.5) / light.shape[0], float(columns.mean() + 0.5) / light.shape[1]


def assert_lit_at(card: Locator, word: str) -> None:
    row, column = PEAKS[word]
    wanted = ((row + 0.5) / GRID[0], (column + 0.5) / GRID[1])
    # Half a region: the brightest light of a region at the border runs on to the border.
    assert np.abs(np.subtract(hot_spot(pixels(card)), wanted) * GRID).max() < 0.5


def test_the_best_the_worst_and_others_are_chosen_once_each():
    quality = {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.9, 5: 0.3, 6: 0.2}
    params = ReportParams(best=2, worst=2, random=2)
    assert choose(quality, params, seed=1)[:4] == [("best", 2), ("best", 4), ("worst", 3), ("worst", 6)]
    assert {image_id for kind, image_id in choose(quality, params, seed=1) if kind == "random"} == {1, 5}
    assert choose(quality, params, seed=1) == choose(quality, params, seed=1)


def test_too_few_images_are_shown_once_all_the_same():
    params = ReportParams(best=2, worst=2, random=2)
    assert choose({1: 0.5, 2: 0.9, 3: 0.1}, params, seed=1) == [("best", 2), ("best", 1), ("worst", 3)]


def test_seeds_draw_other_images():
    drawn = {
        tuple(choose(dict.fromkeys(range(50), 0.0), ReportParams(best=0, worst=0, random=3), seed)) for seed in range(5)
    }
    assert len(drawn) == 5


def test_an_example_has_its_picture_upright_and_in_proportion(tmp_path):
    # Lower half blue as shown; the camera was held so that the stored picture lies on its side.
    upright = Image.new("RGB", (600, 900), "white")
    upright.paste("blue", (0, 450, 600, 900))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    thing = AnnotatedObject(attributes={"shape": "cube", "color": "red"}, box=(0.1, 0.2, 0.3, 0.4))
    (shown,) = shown_of(tmp_path, "a.png", thing)
    assert (shown.choice, shown.image_id, shown.scores) == ("worst", 3, {"CIDEr-D": 0.0})
    assert shown.picture.shape == (LONGER_SIDE, round(LONGER_SIDE * 2 / 3), 3)
    assert shown.picture[50, 50].tolist() == [255, 255, 255]
    assert shown.picture[-50, 50].tolist() == [0, 0, 255]
    assert shown.attention.shape == (2, *GRID)
    assert shown.boxes == {1: ((0.1, 0.2, 0.3, 0.4),)}


def test_a_small_picture_is_not_blown_up(tmp_path):
    Image.new("RGB", (60, 30), "red").save(tmp_path / "a.png")
    assert shown_of(tmp_path, "a.png")[0].picture.shape == (30, 60, 3)


def test_the_part_of_the_picture_that_was_captioned_is_shown(tmp_path):
    sides = Image.new("RGB", (400, 200), "white")
    sides.paste("blue", (200, 0, 400, 200))
    sides.save(tmp_path / "a.png")
    (mirrored,) = shown_of(tmp_path, "a.png", view="whole_flipped")
    assert mirrored.picture.shape == (200, 400, 3)
    assert mirrored.picture[100, 50].tolist() == [0, 0, 255]


def test_a_page_of_photographs_is_small(tmp_path):
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:12]
    if not photographs:
        pytest.skip(f"no photographs in {PHOTOGRAPHS}")
    report = one_report(examples=[shown_of(PHOTOGRAPHS, path.name)[0] for path in photographs])
    write_report(tmp_path / "report.html", report)
    assert 200_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_charts_are_laid_out_by_hand():
    (loss, bleu4) = charts(one_report().history)
    assert (loss.title, bleu4.title) == ("loss (nats a word)", "BLEU-4")
    assert loss.values[0] == (166.0, "2")
    assert loss.values[-1] == (10.0, "5")
    assert loss.epochs == ((40.0, "1"), (312.0, "2"))
    train, val = loss.lines
    assert train.points == ((40.0, 62.0), (312.0, 166.0))
    assert (train.best, val.best) == (None, (312.0, 114.0, "3.000"))
    assert len(bleu4.lines[0].points) == 1


def test_the_same_report_makes_the_same_bytes(tmp_path, path):
    write_report(tmp_path / "again.html", one_report())
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_captions_and_references_are_text_and_not_markup(path):
    read = Reader(path.read_text())
    assert "</script><b>ball" in read.text
    assert REFERENCE in read.text
    assert "tokens: <plain>" in read.text
    assert [tag for tag, _ in read.tags if tag in ("script", "b", "plain")] == ["script"]
    assert all("onerror" not in attributes for _, attributes in read.tags)


def test_nothing_is_read_from_elsewhere_and_no_place_is_told(path):
    text = path.read_text()
    sources = [values[name] for _, values in Reader(text).tags for name in ("src", "href") if name in values]
    assert len(sources) == 3
    assert all(source is not None and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "flickr8k" in text
    assert "someone" not in text


def test_numbers_stand_with_interval_protocol_and_chance(path):
    text = " ".join(Reader(path.read_text()).text.split())
    assert "BLEU-4 0.312 0.290 to 0.333 0.250 0.200 to 0.300" in text
    assert "METEOR no java" in text
    assert "BLEU-4 n: 4 tokens: <plain>" in text
    assert "BLEU-4 0.400 0.300 to 0.500 0.200 0.100 to 0.300 0.200 0.150 to 0.250" in text
    assert "distinct 12 39" in text
    assert "loss (nats a word) train val" in text
    assert "3.000" in text  # the best epoch's
    assert "of 100 words in the test captions: loss 2.062" in text
    assert "relation 4 0.750 0.125 0.500 0.062" in text
    assert "decoder.state 256" in text
    assert f"python {sys.version.split()[0]}" in text


def test_photographs_without_known_things_have_no_table_of_them(tmp_path):
    write_report(tmp_path / "report.html", one_report(scenes={"images": 0}, history=[], examples=[]))
    text = (tmp_path / "report.html").read_text()
    assert "by chance" not in text
    assert "<polyline" not in text


def test_maps_are_a_byte_for_each_region(path):
    words = [values for tag, values in Reader(path.read_text()).tags if tag == "button"]
    steps = np.frombuffer(base64.b64decode(words[1]["data-map"] or ""), dtype=np.uint8).reshape(GRID)
    assert steps[PEAKS["red"]] == 255
    assert np.delete(steps, 3 * GRID[1] + 1).tolist() == [round(255 * 0.02 / 0.54)] * 23
    assert json.loads(words[1]["data-boxes"] or "") == [[0.5, 0.25, 0.25, 0.5]]


def test_pointing_at_a_word_lights_where_it_looked(page: Page) -> None:
    card, other, _ = page.locator(".card").all()
    assert np.ptp(pixels(card)[INSIDE]) == 0
    for word in ("a", "red"):
        card.get_by_role("button", name=word, exact=True).hover()
        assert_lit_at(card, word)
        assert f"{word}: 54% of attention" in card.locator(".told").inner_text()
    assert card.locator(".boxes rect").count() == 1
    assert np.ptp(pixels(other)[INSIDE]) == 0
    page.mouse.move(1, 1)
    assert np.ptp(pixels(card)[INSIDE]) == 0


def test_the_light_is_smooth(page: Page) -> None:
    card = page.locator(".card").first
    card.get_by_role("button", name="</script><b>ball").hover()
    light = pixels(card)[INSIDE].mean(axis=-1)
    # A region is 40 px and more wide, so light by whole regions would jump by all its height between two pixels.
    steps = max(np.abs(np.diff(light, axis=axis)).max() for axis in (0, 1))
    assert 0 < steps < 0.12 * np.ptp(light)


def test_keys_walk_through_a_caption(page: Page) -> None:
    card = page.locator(".card").first
    page.keyboard.press("Tab")
    assert_lit_at(card, "a")
    page.keyboard.press("ArrowRight")
    assert_lit_at(card, "red")
    page.keyboard.press("End")
    assert_lit_at(card, "</script><b>ball")
    page.keyboard.press("ArrowLeft")
    assert_lit_at(card, "red")
    assert card.get_by_role("button", name="red").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert np.ptp(pixels(card)[INSIDE]) == 0


def test_a_finger_does_what_a_pointer_does(chromium: Browser, path: Path) -> None:
    with chromium.new_context(
        **WITHOUT_MOTION, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    ) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("innerWidth") == 360
        card = page.locator(".card").first
        for word in ("red", "a"):
            card.get_by_role("button", name=word, exact=True).tap()
            assert_lit_at(card, word)


def test_light_fades_from_word_to_word(chromium: Browser, path: Path) -> None:
    with chromium.new_context(offline=True) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        card = page.locator(".card").first
        for word in ("a", "red"):
            card.get_by_role("button", name=word, exact=True).hover()
            page.wait_for_timeout(600)
            assert_lit_at(card, word)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_as_asked(chromium: Browser, path: Path, scheme: str) -> None:
    with chromium.new_context(**WITHOUT_MOTION, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        styles = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).background]")
        ink, paper = (list(map(int, re.findall(r"\d+", style)[:3])) for style in styles)
        assert (sum(ink) < sum(paper)) == (scheme == "light")
        assert abs(sum(ink) - sum(paper)) > 3 * 150
