"""The app in a real Chromium, with the real server in a process of its own and models of seeded weights.

`python -m pytest tests/test_app.py -k how_long` prints how long a visitor waits.
"""

import base64
import io
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from typer.testing import CliRunner

from pipeline.artifacts import write_json
from pipeline.captions.vocabulary import END, SPECIALS, Vocabulary
from pipeline.cli import app
from pipeline.decoder.model_io import ModelConfig, TrainingData, write_model
from pipeline.decoder.soft_attention import SoftAttentionDecoder
from pipeline.errors import UserError
from pipeline.features.encoder import STRIDES, Architecture, GridEncoder, Layer, weights_digest
from pipeline.features.store import EncoderSpec
from pipeline.metrics.bootstrap import Resampling
from pipeline.metrics.caption_scores import compute_metrics, summarize_scores
from pipeline.metrics.tokenizers import build_corpora
from pipeline.params import load
from pipeline.prediction.captioner import DEFAULT_SEARCH
from pipeline.training.trainer import TrainParams

pytest.importorskip("streamlit", reason="the app needs Streamlit: pip install 'gridcap[app]'")
pytest.importorskip("playwright", reason="a browser is driven by Playwright: pip install 'gridcap[dev]'")

from playwright.sync_api import sync_playwright

from pipeline.app.components import literal
from pipeline.app.models import Queue
from pipeline.app.runs import read_epochs, read_live, read_scores
from pipeline.app.serve import serve
from pipeline.app.uploads import MAX_BYTES, Picture, check, preview

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "real" / "coco" / "images"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

WORDS = ("dog", "dogs", "runs", "beside", "water", "white", "brown", "grass", "ball", "two", "stands", "the")
MARKUP = ("<b>bold</b>", "<img/src=x/onerror=document.title='run'>", "&amp;", "**stars**", "$x$")


def write_seeded_model(
    folder: Path, architecture: Architecture, layer: Layer, size: int, words: tuple[str, ...]
) -> Path:
    """Write a model folder with its encoder, of weights that nobody trained; its attention is sharp all the same."""
    torch.manual_seed(1)
    vocabulary = Vocabulary(SPECIALS + words)
    encoder = GridEncoder(architecture, layer).eval()
    cells = size // STRIDES[layer]
    spec = EncoderSpec(
        architecture=architecture,
        layer=layer,
        weights_digest=weights_digest(encoder),
        image_size=size,
        precision="float32",
        compiled=False,
        grid_height=cells,
        grid_width=cells,
        channels=encoder.channels,
    )
    params = load(ROOT / "params.yaml", "train", TrainParams).decoder
    decoder = SoftAttentionDecoder(params, spec.grid, encoder.channels, len(vocabulary))
    with torch.no_grad():
        decoder.score_weight *= 50
        decoder.output_proj.weight *= 20
        decoder.output_proj.bias[END] = -1000.0  # all captions are as long as they may be
    config = ModelConfig(
        fingerprint="seeded",
        decoder=params,
        vocabulary_digest=vocabulary.digest,
        encoder=spec,
        encoder_fingerprint=spec.fingerprint,
        view="whole",
        data=TrainingData(num_images=0, num_captions=0, num_val_images=0),
        epoch=1,
        selected_by="cider",
        versions={},
    )
    write_model(folder, decoder.state_dict(), vocabulary, config)
    torch.save(encoder.state_dict(), folder / "encoder.pth")
    return folder


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "JPEG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A small file that claims a large picture."""
    content = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def halves(width: int, height: int) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), (220, 30, 30))
    image.paste((30, 30, 220), (width // 2, 0, width, height))
    return image


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": write_seeded_model(folder / "plain", "resnet50", "layer4", 224, WORDS),
        "markup": write_seeded_model(folder / "markup", "resnet18", "layer3", 128, MARKUP),
        "slow": write_seeded_model(folder / "slow", "resnet18", "layer4", 2048, WORDS),
    }


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    folder: Path
    """That it was started in."""


def forbid_files() -> None:
    """Let a process write to pipes alone: the first byte that it would put into a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@contextmanager
def served(folder: Path, *models: Path) -> Iterator[Server]:
    """Run `gridcap app` in a folder without any repository, without what the stages need, and unable to write files."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['dvc', 'dvclive', 'pycocotools', 'scmrepo', 'spacy']))\n"
        "from pipeline.cli import main; main()"
    )
    named = [argument for model in models for argument in ("--model", str(model))]
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", program, "app", "--port", "0", *named],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=forbid_files,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield Server(url=found[0], folder=folder)
                    break
            else:
                pytest.fail(f"the app ended: {''.join(said)}")
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0


@pytest.fixture(scope="module")
def server(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("served"), models["plain"], models["markup"], models["slow"]) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """Opens the app in a session of its own."""
    contexts = []

    def opened(path: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.goto(f"{server.url}/{path}")
        return page

    yield opened
    for context in contexts:
        context.close()


def words(page: Any, number: int = 0) -> Any:
    return page.locator(".caption").nth(number).locator(".word")


def first_caption(page: Any) -> str:
    words(page).first.wait_for(timeout=60_000)
    return str(page.locator(".caption").first.inner_text())


@contextmanager
def another_picture(page: Any) -> Iterator[list[float]]:
    """Wait, after the body, until the page shows another picture than before it; the page itself watches for that.

    Gives a list that then holds the milliseconds from the click, or the choice of a file, to the picture.
    """
    page.locator(".picture img").first.evaluate(
        """image => {
            const before = image.src;
            let began = performance.now();
            for (const kind of ["click", "change"]) {
                window.addEventListener(kind, () => { began = performance.now(); }, { capture: true, once: true });
            }
            window.changed = new Promise((done, fail) => {
                setTimeout(() => fail(new Error("no other picture is shown")), 30000);
                const watch = new MutationObserver(() => {
                    if (image.src !== before) {
                        watch.disconnect();
                        done(performance.now() - began);
                    }
                });
                watch.observe(image, { attributes: true, attributeFilter: ["src"] });
            });
        }"""
    )
    waited: list[float] = []
    yield waited
    waited.append(page.evaluate("window.changed"))


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.01)


def upload(page: Any, name: str, content: bytes) -> None:
    file = {"name": name, "mimeType": "image/jpeg", "buffer": content}
    page.locator("input[type=file]").first.set_input_files(file)


def upload_and_wait(page: Any, name: str, content: bytes) -> float:
    """Returns the milliseconds that it took."""
    with another_picture(page) as waited:
        upload(page, name, content)
    return waited[0]


def light(page: Any) -> tuple[float, float, float]:
    """How much of the picture is lit, 0 to 1, and the center of the light, 0 to 1 from the left and from the top."""
    total, x, y = page.locator(".picture canvas").first.evaluate(
        """canvas => {
            const { width, height } = canvas;
            const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let total = 0, x = 0, y = 0;
            for (let i = 0; i < width * height; i++) {
                const alpha = pixels[4 * i + 3];
                total += alpha, x += alpha * (i % width), y += alpha * Math.floor(i / width);
            }
            return [total / 255 / width / height, x / total / width, y / total / height];
        }"""
    )
    return total, x, y


def settled_light(page: Any) -> tuple[float, float, float]:
    """The light when it moves no more."""
    seen = [light(page)]

    def still() -> bool:
        time.sleep(0.1)
        seen.append(light(page))
        return seen[-1] == seen[-2] and seen[-1][0] > 0

    until(still, "the light stands still")
    return seen[-1]


def photographs(count: int) -> list[tuple[str, bytes]]:
    """Real photographs where there are any, else what stands for them."""
    found = sorted(PHOTOGRAPHS.glob("*.jpg"))[:count]
    if found:
        return [(path.name, path.read_bytes()) for path in found]
    return [(f"{number}.jpg", jpeg(halves(640 + number, 480))) for number in range(count)]


@needs_chromium
def test_a_photograph_is_captioned_and_its_words_show_where_the_model_looked(open_page: Callable[..., Any]) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: socket.on("framesent", lambda _: asked.append(socket.url)))
    page.reload()
    assert len(first_caption(page).split()) > 1  # of a sample, before anyone has done anything
    name, content = photographs(1)[0]
    upload_and_wait(page, name, content)
    with Image.open(io.BytesIO(content)) as image:
        box = page.locator(".picture").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(image.width / image.height, rel=0.02)

    assert page.locator(".looking").count() == 0
    assert asked
    assert {urlsplit(url).hostname for url in asked if url.startswith(("http", "ws"))} == {"127.0.0.1"}
    asked.clear()
    words(page).nth(0).hover()
    lit, x, y = settled_light(page)
    assert 0 < lit < 0.9
    assert page.locator(".looking").count() == 1
    assert re.fullmatch(rf"{words(page).nth(0).inner_text()} · \d+%", page.locator(".viewer .note").inner_text())
    centers = {(round(x, 2), round(y, 2))}
    for number in range(1, min(6, words(page).count())):
        words(page).nth(number).hover()
        _, x, y = settled_light(page)
        centers.add((round(x, 2), round(y, 2)))
    assert len(centers) > 2  # it moves from word to word
    page.mouse.move(0, 0)
    page.locator(".looking").wait_for(state="detached")
    assert asked == []  # all that without the server


@needs_chromium
def test_words_answer_to_keys_and_to_touch(open_page: Callable[..., Any]) -> None:
    page = open_page(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    first_caption(page)
    words(page).nth(1).tap()
    assert "lit" in words(page).nth(1).get_attribute("class")
    page.locator(".picture").tap()
    assert page.locator(".word.lit").count() == 0
    words(page).nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert "lit" in words(page).nth(1).get_attribute("class")
    page.keyboard.press("Escape")
    assert page.locator(".word.lit").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing juts out


@needs_chromium
def test_alternatives_come_from_the_beam_and_light_the_picture_too(open_page: Callable[..., Any]) -> None:
    page = open_page()
    first_caption(page)
    rows = page.locator(".others li")
    assert rows.count() == DEFAULT_SEARCH.beam - 1
    scores = [float(row.locator(".score").inner_text().split("·")[1]) for row in rows.all()]
    assert scores == sorted(scores, reverse=True)
    rows.nth(1).locator(".word").nth(0).hover()
    assert settled_light(page)[0] > 0

    slider = page.get_by_role("slider", name="Beam")
    slider.focus()
    slider.press("ArrowRight")
    until(lambda: rows.count() == DEFAULT_SEARCH.beam, "a wider beam gives one alternative more")
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name="sample").click()
    page.get_by_role("slider", name="Temperature").wait_for()
    until(lambda: rows.count() == 2, "three captions are drawn")
    assert page.get_by_role("slider", name="Beam").count() == 0
    assert page.get_by_test_id("stAlert").count() == 0


@needs_chromium
def test_two_models_stand_side_by_side_and_captions_are_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    first_caption(page)
    page.get_by_role("combobox", name="Beside it").click()
    page.get_by_role("option", name="markup").click()
    words(page, 1).first.wait_for()
    assert set(page.locator(".caption").nth(0).inner_text().split()) <= set(WORDS)
    assert set(page.locator(".caption").nth(1).inner_text().split()) <= set(MARKUP)
    assert page.locator(".caption b, .caption img, li b, li img").count() == 0
    assert page.title() == "gridcap"


@needs_chromium
def test_what_is_no_picture_is_told_and_the_next_picture_captioned(open_page: Callable[..., Any]) -> None:
    page = open_page()
    first_caption(page)
    alert = page.get_by_test_id("stAlert")
    for name, content, said in (
        ("broken.jpg", b"\xff\xd8\xff\xe0 and no more", "broken.jpg: is no picture"),
        ("cut.jpg", jpeg(halves(800, 600))[:3000], "cut.jpg: cannot be read as a picture"),
        ("*b* <b>old.png", b"GIF", "*b* <b>old.png: is no picture"),
        ("bomb.png", png_bomb(10_000, 10_000), "bomb.png: cannot be read as a picture (10000 x 10000 px, more than"),
        ("drawing.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "drawing.jpg: is no picture"),
    ):
        upload(page, name, content)
        until(lambda: [text[: len(said)] for text in alert.all_inner_texts()] == [said], f"{name} is told")  # noqa: B023
        assert page.locator(".viewer").count() == 0
    upload(page, "whole.jpg", jpeg(halves(320, 200)))
    assert first_caption(page)
    assert alert.count() == 0


@needs_chromium
def test_pictures_of_every_kind_are_taken_and_shown_upright(open_page: Callable[..., Any]) -> None:
    page = open_page()
    first_caption(page)
    on_its_side = Image.Exif()
    on_its_side[ExifTags.Base.Orientation] = 6  # the camera was held turned left
    pictures = {
        "turned.jpg": jpeg(halves(320, 200), exif=on_its_side),
        "gray.jpg": jpeg(halves(300, 200).convert("L")),
        "cmyk.jpg": jpeg(halves(310, 200).convert("CMYK")),
        "clear.png": encoded(Image.new("RGBA", (200, 300), (0, 0, 0, 0)), "PNG"),
        "deep.tif": encoded(Image.fromarray(np.full((90, 120), 40_000, dtype=np.uint16)), "TIFF"),
        "moving.gif": encoded(halves(64, 48), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48))]),
        "large.jpg": jpeg(Image.effect_noise((1500, 1000), 90), quality=97),  # more than a MB: not through a file
    }
    assert len(pictures["large.jpg"]) > 2**20
    for name, content in pictures.items():
        upload_and_wait(page, name, content)
        assert page.get_by_test_id("stAlert").count() == 0
        if name == "turned.jpg":
            box = page.locator(".picture").bounding_box()
            assert box["width"] < box["height"]
    # The server could not have written a single byte to a file, and left none where it was started.


@needs_chromium
def test_a_picture_is_pasted_or_chosen_among_the_samples(open_page: Callable[..., Any]) -> None:
    page = open_page()
    first_caption(page)
    with another_picture(page):
        page.evaluate(
            """content => {
                const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
                const clipboardData = new DataTransfer();
                clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
                document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
            }""",
            base64.b64encode(encoded(halves(400, 100), "PNG")).decode(),
        )
    box = page.locator(".picture").bounding_box()
    assert box["width"] / box["height"] == pytest.approx(4, rel=0.02)
    samples = page.locator(".samples button")
    assert samples.count() > 3
    with another_picture(page):
        samples.nth(2).click()


@needs_chromium
def test_a_session_is_drawn_while_another_waits_for_its_caption(open_page: Callable[..., Any]) -> None:
    waiting, other = open_page(), open_page("training")
    first_caption(waiting)
    other.get_by_text("Current run").wait_for()
    waiting.get_by_role("combobox", name="Model").click()
    waiting.get_by_role("option", name="slow").click()
    waiting.get_by_test_id("stSpinner").wait_for()
    other.get_by_role("link", name="Captions").click()
    other.locator(".samples button").first.wait_for()
    assert waiting.get_by_test_id("stSpinner").count() == 1
    waiting.get_by_test_id("stSpinner").wait_for(state="detached")
    first_caption(other)


@needs_chromium
def test_the_page_of_training_follows_the_run(open_page: Callable[..., Any], server: Server) -> None:
    curve = server.folder / "results" / "live" / "plots" / "metrics" / "train" / "loss.tsv"
    page = open_page("training")
    page.get_by_text("No run has left metrics").wait_for()
    curve.parent.mkdir(parents=True)
    curve.write_text("step\tloss\n10\t3.5\n20\t2.25\n")
    metrics = page.get_by_test_id("stMetricValue")
    until(lambda: metrics.all_inner_texts() == ["20", "2.250"], "the run is seen")
    page.get_by_text("running").wait_for()
    with curve.open("a") as file:
        file.write("30\t1.125\n4")  # and a row that is being written
    until(lambda: metrics.all_inner_texts() == ["30", "1.125"], "the new row is seen")


@needs_chromium
def test_how_long_it_takes(open_page: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    page = open_page()
    first_caption(page)
    first = time.monotonic() - started
    uploaded, chosen = [], []
    for name, content in photographs(6):
        uploaded.append(upload_and_wait(page, name, content))
    for sample in page.locator(".samples button").all()[1:7]:
        with another_picture(page) as waited:
            sample.click()
        chosen += waited
    assert len(uploaded) == len(chosen) == 6
    with capsys.disabled():
        print(f"\ngridcap app, ResNet-50 at 224 px: the first caption {first:.2f} s after the page was opened,")
        print("and further ones, of 30 words, the most that the settings allow,")
        print(f"{np.median(chosen):.0f} ms after a sample, {np.median(uploaded):.0f} ms after a file")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_preview_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    made = preview(Picture(name="a.jpg", content=jpeg(halves(300, 200), exif=exif)))
    assert (made.width > made.height) == (orientation < 5)
    with Image.open(io.BytesIO(made.jpeg)) as image:
        assert image.size == (made.width, made.height)


def test_a_file_that_is_too_large_or_of_another_format_is_refused() -> None:
    check(Picture(name="a.jpg", content=jpeg(halves(3, 2))))
    with pytest.raises(UserError, match=r"a\.jpg: has 20\.0 MB, more than 20"):
        check(Picture(name="a.jpg", content=bytes(MAX_BYTES + 1)))
    with pytest.raises(UserError, match=r"a\.ppm: is no picture"):
        check(Picture(name="a.ppm", content=encoded(halves(3, 2), "PPM")))


def test_markdown_shows_a_text_as_it_stands() -> None:
    assert literal("a_*b*.jpg") == r"a\_\*b\*\.jpg"


def test_a_queue_takes_no_more_than_may_wait() -> None:
    queue, door = Queue(2), Event()
    answers = [queue.ask(door.wait), queue.ask(lambda: 7)]
    with pytest.raises(UserError, match="too many pictures"):
        queue.ask(lambda: 8)
    door.set()
    assert [answer.result() for answer in answers] == [True, 7]
    assert queue.ask(lambda: 9).result() == 9


def test_results_are_read_as_they_stand(tmp_path: Path) -> None:
    assert read_live(tmp_path) is None
    assert read_epochs(tmp_path / "training.json") == read_scores(tmp_path / "scores.json") == {}
    (tmp_path / "training.json").write_text(
        '[{"epoch": 1, "val_loss": 2.5, "val_cider": null}, {"epoch": 2, "val_loss": 2}]'
    )
    assert read_epochs(tmp_path / "training.json") == {"val_loss": [(1, 2.5), (2, 2)]}
    (corpus,) = build_corpora("spacy", {1: ["a red cube"], 2: ["a blue cube"]}, [{1: "a red cube", 2: "a red cube"}])
    measured = compute_metrics(corpus, with_meteor=False, with_spice=False)
    write_json(
        tmp_path / "scores.json", summarize_scores(measured, {"seen": [1]}, Resampling(bootstrap_samples=100, seed=0))
    )
    found = read_scores(tmp_path / "scores.json")
    assert list(found) == ["all", "seen"]
    assert list(found["all"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "CIDEr"]
    assert found["all"]["ROUGE-L"] == pytest.approx(5 / 6, abs=1e-6)
    assert found["seen"]["ROUGE-L"] == 1
    (tmp_path / "scores.json").write_text('{"images": 3, "BLEU-4"')
    assert read_scores(tmp_path / "scores.json") == {}


def test_an_address_that_is_taken_is_told(models: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"address 127\.0\.0\.1, port {port} is taken"):
            serve([models["plain"]], "127.0.0.1", port)


@pytest.mark.parametrize("port", ["-1", "65536", "99999"])
def test_a_port_that_no_machine_has_is_refused(port: str) -> None:
    result = CliRunner().invoke(app, ["app", "--port", port])
    assert result.exit_code == 2
    assert "--port" in result.output
    assert "Input should be" in result.output


def test_a_folder_that_is_no_model_is_told_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        serve([tmp_path], "127.0.0.1", 0)
