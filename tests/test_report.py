import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from pipeline.captions.records import SPLITS, Record
from pipeline.evaluation.dataset_stats import DatasetStats, Range, SplitStats, VocabularyStats
from pipeline.evaluation.evaluate import ReportParams
from pipeline.metrics.caption_scores import compute_metrics
from pipeline.metrics.corpus import Corpus
from pipeline.metrics.tokenizers import SPACY
from pipeline.report.examples import Example, Thumbnail, build_examples
from pipeline.report.report import Report, write_report
from tests.evaluation_data import GRID, make_data, peaked_attention

PHOTO_DIR = Path(__file__).parents[2] / "shared/real/coco/images"
# Row and column of each word's region with the most attention.
PEAKS = {"a": (0, 0), "red": (3, 1), "</script><b>ball": (1, 4)}
REFERENCE = 'A <ball> & "more" </script><img src=x onerror=alert(1)>'
GRAY = np.full((160, 240, 3), 128, dtype=np.uint8)
# Part of a screenshot without the card's rounded corners.
INSIDE = (slice(12, -12), slice(12, -12))
REDUCED_MOTION = {"reduced_motion": "reduce", "offline": True}


def browser(test: Callable[..., Any]) -> Any:
    """Mark a test that runs Chromium."""
    return pytest.mark.browser(pytest.mark.slow(test))


def make_example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "image_id": 7,
        "group": "best",
        "image": GRAY,
        "words": tuple(PEAKS),
        "language": "en",
        "trained_words": None,
        "attention": peaked_attention(*PEAKS.values()),
        "references": (REFERENCE, "A second one"),
        "scores": {"CIDEr-D": 1.25, "ROUGE-L": 0.5},
        "boxes": {1: [(0.5, 0.25, 0.25, 0.5)]},
    }
    return Example(**values | changes)


def make_word_usage(**tables: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("overused_words", "underused_words", "overused_phrases", "repeated_words", "number_words")
    return {
        "generated": {"precision": 0.4375, "num_overused_words": 7},
        "reference": {"precision": None, "num_overused_words": 0},
        **{name: [] for name in names},
        **tables,
        "protocol": ["said: images"],
    }


def make_statements(counts: float | None) -> dict[str, Any]:
    return {
        "names": {"num_captions_without_names": 0, "accuracy": 0.75},
        "relations": {"num_relations": 7, "accuracy": 0.5},
        "counts": {"num_groups": 4, "accuracy": counts, "num_plurals": 2, "plural_accuracy": 1.0},
    }


def make_dataset_stats() -> DatasetStats:
    captions = Range(min=5, mean=5.25, max=6)
    split = SplitStats(
        num_images=1200,
        num_captions=6300,
        references_per_image=captions,
        words_per_caption=None,
        unk_rate=0.0625,
        num_leaked_images=3,
        num_near_duplicates=None,
    )
    return DatasetStats(
        splits=dict.fromkeys(SPLITS, split),
        vocab_size=84,
        vocabularies=[VocabularyStats(min_count=2, num_words=80, coverage=dict.fromkeys(SPLITS, 0.9375))],
        num_sized_images=500,
        width=Range(min=80, mean=190, max=400),
        height=None,
        max_images_per_caption=40,
        num_shared_captions=1,
        shared_captions=[("no <image>", 40)],
        leaked_images=[["a.jpg (train)", "b.jpg (test)"]],
        near_duplicates=[],
    )


def make_report(**changes: Any) -> Report:
    empty = make_example(group="random", image_id=9, words=(), attention=np.zeros((0, *GRID)), boxes={})
    grounding = {
        "num_words": 4,
        "peak_in_box": 0.75,
        "peak_by_chance": 0.125,
        "mass_in_box": 0.5,
        "mass_by_chance": 0.0625,
    }
    values: dict[str, Any] = {
        "split": "test",
        "examples": [make_example(), make_example(group="random", image_id=8), empty],
        "thumbnails": {},
        "scores": {
            "num_images": 40,
            "num_skipped_images": 3,
            "BLEU-4": 0.3125,
            "subsets": {"seen": {"num_images": 30, "BLEU-4": 0.25}},
            "intervals": {"BLEU-4": [0.29, 0.3333], "subsets": {"seen": {"BLEU-4": [0.2, 0.3]}}},
            "protocol": {"BLEU-4": ["n: 4", "tokenizer: <spacy>"], "intervals": ["intervals: 95%"]},
            "signature": {"BLEU-4": ["BLEU-4|refs:5"]},
            "unavailable": {"METEOR": ["no java"]},
            "published": [],
        },
        "captions": {
            "diversity": {
                "generated": {"num_distinct_captions": 12},
                "reference": {"num_distinct_captions": 39},
                "protocol": ["num_distinct_captions: of all"],
            },
            "word_usage": make_word_usage(),
            "human_agreement": {
                "num_images": 40,
                "BLEU-4": {"human": [0.2, 0.1, 0.3], "model": [0.4, 0.3, 0.5], "model - human": [0.2, 0.15, 0.25]},
                "protocol": ["human: each"],
            },
        },
        "teacher_forcing": {"num_tokens": 100, "loss": 2.0625, "protocol": ["loss: nats"]},
        "scenes": {
            "num_images": 40,
            **make_statements(0.25),
            "attention": {"all": {"num_words": 0, **dict.fromkeys(grounding)}, "relation": grounding},
            "protocol": {name: [f"{name}: defined"] for name in ("names", "relations", "counts", "attention")},
        },
        "dataset": make_dataset_stats(),
        "history": [
            {"epoch": 1, "train_loss": 4.0, "val_loss": 5.0, "val_bleu4": None},
            {"epoch": 2, "train_loss": 2.0, "val_loss": 3.0, "val_bleu4": 0.125},
        ],
        "params": {
            "dataset": {"root": "/home/someone/flickr8k"},
            "train": {"decoder": {"hidden_size": 256}, "seed": 1},
        },
    }
    return Report(**values | changes)


class PageParser(HTMLParser):
    """Collects the tags with their attributes, and the text of the page."""

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
    write_report(path, make_report())
    return path


def test_the_dataset_is_described(path: Path) -> None:
    text = " ".join(PageParser(path.read_text()).text.split())
    assert "images also in another split 3 3 3" in text
    assert "references per image 5.2 (5 to 6)" in text
    assert "image width, px 190.0 (80 to 400), of 500 images image height, px -, of 500 images" in text
    assert "a.jpg (train) = b.jpg (test)" in text
    assert "no <image> (40 images)" in text
    assert "Near-duplicates, at most" not in text
    assert "2 80 0.938 0.938 0.938" in text


@pytest.fixture
def page(chromium: Browser, path: Path) -> Iterator[Page]:
    with chromium.new_context(**REDUCED_MOTION, viewport={"width": 1000, "height": 900}) as context:
        page = context.new_page()
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("console", lambda message: errors.append(message.text))
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        yield page
        assert errors == []
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]


def pixels(card: Locator) -> np.ndarray:
    """Return a screenshot of the image of a card without status and boxes, [H, W, 3]."""
    shot = card.locator(".attention-overlay").screenshot(style=".status, .boxes { visibility: hidden }")
    with Image.open(io.BytesIO(shot)) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def brightest_point(screenshot: np.ndarray) -> tuple[float, float]:
    """Return the center of the brightest pixels, as fractions of height and width."""
    brightness = np.zeros(screenshot.shape[:2])
    brightness[INSIDE] = screenshot[INSIDE].mean(axis=-1)
    rows, columns = np.nonzero(brightness >= np.quantile(brightness, 0.995))
    height, width = brightness.shape
    return float(rows.mean() + 0.5) / height, float(columns.mean() + 0.5) / width


def assert_highlighted(card: Locator, word: str) -> None:
    row, column = PEAKS[word]
    expected = ((row + 0.5) / GRID[0], (column + 0.5) / GRID[1])
    # Within half a region: the highlight of a region at the border extends to the border.
    assert np.abs(np.subtract(brightest_point(pixels(card)), expected) * GRID).max() < 0.5


def test_the_same_report_gives_the_same_bytes(tmp_path, path):
    write_report(tmp_path / "again.html", make_report())
    assert (tmp_path / "again.html").read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_page_of_12_photos_is_smaller_than_2_mb(tmp_path):
    photos = sorted(PHOTO_DIR.glob("*.jpg"))[:12]
    if not photos:
        pytest.skip(f"no photos in {PHOTO_DIR}")
    records = [
        Record(image_id=image_id, file=path.name, split="test", captions=("A cube.",))
        for image_id, path in enumerate(photos)
    ]
    data = make_data(tmp_path, PHOTO_DIR, records, "a cube")
    corpus = Corpus(
        image_ids=tuple(data.generated),
        hypotheses=(["a", "cube"],) * len(records),
        references=([["a", "cube"]],) * len(records),
        tokenization=SPACY,
    )
    metrics = compute_metrics(corpus, with_meteor=False, with_spice=False)
    examples = build_examples(data, metrics, ReportParams(best=12, worst=0, random=0), seed=1)
    write_report(tmp_path / "report.html", make_report(examples=examples))
    assert 200_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_the_page_counts_the_images_that_were_skipped(path):
    text = " ".join(PageParser(path.read_text()).text.split())
    assert "captions for 40 test images. This page shows some of them. 3 more test images are left out" in text


def test_captions_and_references_are_escaped(path):
    page = PageParser(path.read_text())
    assert "</script><b>ball" in page.text
    assert REFERENCE in page.text
    assert "tokenizer: <spacy>" in page.text
    assert [tag for tag, _ in page.tags if tag in ("script", "b", "spacy")] == ["script"]
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_the_page_needs_no_other_file_and_shows_no_absolute_path(path):
    text = path.read_text()
    sources = [values[name] for _, values in PageParser(text).tags for name in ("src", "href") if name in values]
    assert len(sources) == 3
    assert all(source is not None and source.startswith("data:image/jpeg;base64,") for source in sources)
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert "flickr8k" in text
    assert "someone" not in text


def test_the_page_of_one_image_has_scores_without_intervals(tmp_path):
    scores = {
        "num_images": 1,
        "num_skipped_images": 0,
        "BLEU-4": 0.3125,
        "intervals": {},
        "protocol": {"BLEU-4": ["n: 4"], "intervals": ["intervals: not defined for one image"]},
        "signature": {"BLEU-4": ["BLEU-4|refs:5"]},
        "unavailable": {"CIDEr-D": ["not defined for one image"]},
        "published": [],
    }
    write_report(tmp_path / "report.html", make_report(scores=scores))
    text = " ".join(PageParser((tmp_path / "report.html").read_text()).text.split())
    assert "BLEU-4 0.312 CIDEr-D not defined for one image" in text


def test_the_page_shows_captions_and_scores_before_refinement(tmp_path):
    examples = [make_example(trained_words=("a", "<pale>", "ball")), make_example(image_id=8, trained_words=())]
    report = make_report(examples=examples)
    change = {"trained": 0.25, "refined": 0.3125, "difference": 0.0625, "interval": [-0.01, 0.125]}
    scores = report.scores | {"refinement": {"BLEU-4": change | {"significant": False}}}
    diversity = report.captions["diversity"] | {"trained": {"num_distinct_captions": 17}}
    captions = report.captions | {"diversity": diversity}
    statements = {
        "names": {"accuracy": change},
        "relations": {"accuracy": None},
        "counts": {"accuracy": change, "plural_accuracy": change | {"interval": None}},
    }
    scenes = report.scenes | {"refinement": statements | {"subsets": {"seen": statements}}}
    write_report(tmp_path / "report.html", replace(report, scores=scores, captions=captions, scenes=scenes))
    text = " ".join(PageParser((tmp_path / "report.html").read_text()).text.split())
    assert "before refinement a <pale> ball" in text
    assert "before refinement no words" in text
    assert "BLEU-4 0.250 0.312 0.062 −0.010 to 0.125" in text
    assert "generated human before refinement" in text
    assert "distinct captions 12 39 17" in text
    assert "captions whose objects are all correct 0.250 0.312 0.062 −0.010 to 0.125 spatial relations that" in text
    assert "spatial relations that hold seen not defined groups of alike objects" in text
    assert "mentions of several objects with the right number seen 0.250 0.312 0.062 Human" in text


def test_the_page_of_a_model_without_refinement_does_not_mention_it(path):
    assert "efinement" not in PageParser(path.read_text()).text


def test_the_page_shows_scores_with_interval_protocol_and_chance(path):
    text = " ".join(PageParser(path.read_text()).text.split())
    assert "BLEU-4 0.312 0.290 to 0.333 0.250 0.200 to 0.300" in text
    assert "METEOR no java" in text
    assert "BLEU-4 n: 4 tokenizer: <spacy> BLEU-4|refs:5" in text
    assert "BLEU-4 0.400 0.300 to 0.500 0.200 0.100 to 0.300 0.200 0.150 to 0.250" in text
    assert "distinct captions 12 39" in text
    assert "loss (nats per word) train val" in text
    assert "3.000" in text  # loss of the best epoch
    assert "on 100 tokens of the test captions: loss 2.062" in text
    assert "relation 4 0.750 0.125 0.500 0.062" in text
    assert "decoder.hidden_size 256" in text
    assert f"python {sys.version.split()[0]}" in text


def test_published_scores_are_shown_beside_those_of_the_run(tmp_path, path):
    assert "Published scores" not in path.read_text()
    row = {"system": "soft <attention>", "source": "Xu et al. 2015", "data": "test split", "notes": "VGG encoder"}
    rows = [row | {"scores": {"METEOR": 0.25, "BLEU-4": 0.195}}, row | {"notes": None, "scores": {"BLEU-4": 0.25}}]
    scores = make_report().scores | {"published": rows}
    write_report(tmp_path / "report.html", make_report(scores=scores))
    text = " ".join(PageParser((tmp_path / "report.html").read_text()).text.split())
    assert "BLEU-4 METEOR this run 40 test images 0.312 0.290 to 0.333 – soft <attention>" in text
    assert "soft <attention> test split; VGG encoder (Xu et al. 2015) 0.195 0.250" in text
    assert "soft <attention> test split (Xu et al. 2015) 0.250 –" in text
    assert "Signatures of this run: BLEU-4|refs:5 Scores" in text


def test_the_page_says_what_is_not_defined(tmp_path):
    names = ("peak_in_box", "peak_by_chance", "mass_in_box", "mass_by_chance")
    captions = {
        "word_usage": make_word_usage(),
        "diversity": {
            "generated": {"distinct_bigram_rate": None},
            "reference": {"distinct_bigram_rate": 0.5},
            "protocol": [],
        },
        "human_agreement": {"num_images": 0, "protocol": []},
    }
    attention = {"all": {"num_words": 0, **dict.fromkeys(names)}}
    protocol: dict[str, list[str]] = {name: [] for name in ("names", "relations", "counts", "attention")}
    scenes = {"num_images": 1, **make_statements(None), "attention": attention, "protocol": protocol}
    write_report(tmp_path / "report.html", make_report(captions=captions, scenes=scenes))
    text = " ".join(PageParser((tmp_path / "report.html").read_text()).text.split())
    assert "distinct bigram rate not defined 0.500" in text
    assert "Human agreement Not defined: no image has two references." in text
    assert "all of the above 0 not defined not defined not defined not defined" in text
    assert "groups of alike objects that are counted not defined of 4" in text


def test_words_that_are_said_too_often_have_an_example(tmp_path):
    row = {"phrase": "<bench>", "kind": "noun", "said": 29, "right": 1, "in_references": 2.4, "image_id": 17}
    usage = make_word_usage(overused_words=[row], overused_phrases=[{**row, "phrase": "on a <bench>", "kind": None}])
    captions = {**make_report().captions, "word_usage": usage}
    thumbnails = {17: Thumbnail(image=GRAY, words=("a", "dog", "on", "a", "<bench>"))}
    write_report(tmp_path / "report.html", make_report(captions=captions, thumbnails=thumbnails, examples=[]))
    page = PageParser((tmp_path / "report.html").read_text())
    text = " ".join(page.text.split())
    assert "precision 0.438 not defined overused words 7 0 How" in text
    assert "Words said too often said right in references caption of an example image <bench> noun 29 1 2.4" in text
    assert "on a <bench> 29 1 2.4 a dog on a <bench>" in text
    assert "Words said too rarely" not in text
    assert [values["alt"] for tag, values in page.tags if tag == "img"] == ["Image 17"] * 2


def test_images_without_annotated_objects_have_no_attention_table(tmp_path):
    write_report(tmp_path / "report.html", make_report(scenes={"num_images": 0}, history=[], examples=[]))
    text = (tmp_path / "report.html").read_text()
    assert "by chance" not in text
    assert "<polyline" not in text


def test_attention_maps_have_one_byte_per_region(path):
    words = [values for tag, values in PageParser(path.read_text()).tags if tag == "button"]
    levels = np.frombuffer(base64.b64decode(words[1]["data-map"] or ""), dtype=np.uint8).reshape(GRID)
    assert levels[PEAKS["red"]] == 255
    assert np.delete(levels, 3 * GRID[1] + 1).tolist() == [round(255 * 0.02 / 0.54)] * 23
    assert json.loads(words[1]["data-boxes"] or "") == [[0.5, 0.25, 0.25, 0.5]]


@browser
def test_hovering_a_word_highlights_its_attention(page: Page) -> None:
    card, other, _ = page.locator(".card").all()
    assert np.ptp(pixels(card)[INSIDE]) == 0
    for word in ("a", "red"):
        card.get_by_role("button", name=word, exact=True).hover()
        assert_highlighted(card, word)
        assert f"{word}: 54% of attention" in card.locator(".status").inner_text()
    assert card.locator(".boxes rect").count() == 1
    assert np.ptp(pixels(other)[INSIDE]) == 0
    page.mouse.move(1, 1)
    assert np.ptp(pixels(card)[INSIDE]) == 0


@browser
def test_the_weight_of_the_sentinel_is_shown(chromium: Browser, tmp_path: Path) -> None:
    attention = peaked_attention(*PEAKS.values())
    attention[1] *= 0.38
    path = tmp_path / "report.html"
    write_report(path, make_report(examples=[make_example(attention=attention)]))
    with chromium.new_context(**REDUCED_MOTION) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        for word, text in (("a", "a: 54% of attention on one of 24 regions"), ("red", "regions · sentinel 62%")):
            page.get_by_role("button", name=word, exact=True).hover()
            assert page.locator(".status").inner_text().endswith(text)


@browser
def test_the_highlight_is_smooth(page: Page) -> None:
    card = page.locator(".card").first
    card.get_by_role("button", name="</script><b>ball").hover()
    brightness = pixels(card)[INSIDE].mean(axis=-1)
    # A region is 40 px or wider, so unsmoothed regions would jump by the full range between two pixels.
    max_step = max(np.abs(np.diff(brightness, axis=axis)).max() for axis in (0, 1))
    assert 0 < max_step < 0.12 * np.ptp(brightness)


@browser
def test_arrow_keys_step_through_a_caption(page: Page) -> None:
    card = page.locator(".card").first
    page.keyboard.press("Tab")
    assert_highlighted(card, "a")
    page.keyboard.press("ArrowRight")
    assert_highlighted(card, "red")
    page.keyboard.press("End")
    assert_highlighted(card, "</script><b>ball")
    page.keyboard.press("ArrowLeft")
    assert_highlighted(card, "red")
    assert card.get_by_role("button", name="red").get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert np.ptp(pixels(card)[INSIDE]) == 0


@browser
def test_touch_highlights_attention(chromium: Browser, path: Path) -> None:
    with chromium.new_context(
        **REDUCED_MOTION, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True
    ) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("innerWidth") == 360
        card = page.locator(".card").first
        for word in ("red", "a"):
            card.get_by_role("button", name=word, exact=True).tap()
            assert_highlighted(card, word)


@browser
def test_the_highlight_fades_between_words(chromium: Browser, path: Path) -> None:
    with chromium.new_context(offline=True) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        card = page.locator(".card").first
        for word in ("a", "red"):
            card.get_by_role("button", name=word, exact=True).hover()
            page.wait_for_timeout(600)
            assert_highlighted(card, word)


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_color_scheme(chromium: Browser, path: Path, scheme: str) -> None:
    with chromium.new_context(**REDUCED_MOTION, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        styles = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).background]")
        text_color, background = (list(map(int, re.findall(r"\d+", style)[:3])) for style in styles)
        assert (sum(text_color) < sum(background)) == (scheme == "light")
        assert abs(sum(text_color) - sum(background)) > 3 * 150
