"""The pages of the app in Chromium, served by `gridcap app` in a subprocess, with models of random weights."""

import base64
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pipeline.captions.vocabulary import END, SPECIALS, Vocabulary
from pipeline.decoder.decoder import DecoderKind, DecoderParams
from pipeline.decoder.model_io import write_model
from pipeline.decoder.registry import build_decoder
from pipeline.errors import printable
from pipeline.features.encoder import GridEncoder, weights_digest
from pipeline.features.resnets import STRIDES, Architecture, Layer
from pipeline.features.store import EncoderSpec
from pipeline.generation.search_settings import write_search_settings
from pipeline.params import load_key
from pipeline.prediction.captioner import DEFAULT_SEARCH
from tests.image_files import encode_image, encode_jpeg, png_bomb, red_blue_image
from tests.model_folders import model_config

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
WORDS = ("dog", "dogs", "runs", "beside", "water", "white", "brown", "grass", "ball", "two", "stands", "the")
MARKUP = ("<b>bold</b>", "<img/src=x/onerror=document.title='run'>", "&amp;", "**stars**", "$x$")
TIMEOUT = 60_000  # ms


def write_random_model(
    folder: Path,
    architecture: Architecture,
    layer: Layer,
    image_size: int,
    words: tuple[str, ...],
    kind: DecoderKind = "soft_attention",
) -> Path:
    """Write a model folder with its encoder, with random weights, sharp attention and captions of full length."""
    torch.manual_seed(1)
    vocabulary = Vocabulary(SPECIALS + words)
    encoder = GridEncoder(architecture, layer).eval()
    grid_side = image_size // STRIDES[layer]
    spec = EncoderSpec(
        architecture=architecture,
        layer=layer,
        weights_digest=weights_digest(encoder),
        image_height=image_size,
        image_width=image_size,
        resize="squash",
        precision="float32",
        compiled=False,
        grid_height=grid_side,
        grid_width=grid_side,
        channels=encoder.channels,
    )
    params = replace(load_key(ROOT / "params.yaml", "train.decoder", DecoderParams), kind=kind)
    decoder = build_decoder(params, spec.grid, encoder.channels, len(vocabulary))
    with torch.no_grad():
        decoder.score_weight *= 50 if kind == "soft_attention" else 5  # leaves some weight to a sentinel
        decoder.output_proj.weight *= 20
        decoder.output_proj.bias[END] = -1000.0
    config = model_config(fingerprint="random", decoder=params, vocabulary_digest=vocabulary.digest, encoder=spec)
    write_model(folder, decoder.state_dict(), vocabulary, config)
    torch.save(encoder.state_dict(), folder / "encoder.pth")
    return folder


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    folder: Path
    """Folder in which the app was started."""
    process: subprocess.Popen[str]


def forbid_file_writes() -> None:
    """Make every write to a file fail in this process; pipes and sockets work."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@contextmanager
def serve_app(folder: Path, *models: Path) -> Iterator[Server]:
    """Run `gridcap app` in a folder, without the packages of the stages, and unable to write files."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['dvc', 'pycocotools', 'scmrepo', 'spacy']))\n"
        "from pipeline.cli import main; main()"
    )
    model_flags = [flag for model in models for flag in ("--model", str(model))]
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", program, "app", "--port", "0", *model_flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=forbid_file_writes,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            output = []
            for line in process.stdout:
                output.append(line)
                if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield Server(url=match[0], folder=folder, process=process)
                    break
            else:
                pytest.fail(f"the app exited: {''.join(output)}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that needs seconds to caption an image."""
    return write_random_model(tmp_path_factory.mktemp("slow_model") / "slow", "resnet50", "layer4", 2048, WORDS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    models = [
        write_random_model(folder / "plain", "resnet50", "layer4", 224, WORDS),
        write_random_model(folder / "markup", "resnet18", "layer3", 128, MARKUP, kind="adaptive"),
        slow_model,
    ]
    write_search_settings(folder / "markup", replace(DEFAULT_SEARCH, beam_size=3), "random")
    with serve_app(tmp_path_factory.mktemp("served"), *models) as server:
        yield server


@pytest.fixture
def open_page(chromium: "Browser", server: Server) -> Iterator[Callable[..., "Page"]]:
    """Return a function that opens a page of the app in a new session."""
    contexts = []

    def open_in_new_session(path: str = "", **options: Any) -> "Page":
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.goto(f"{server.url}/{path}")
        return page

    yield open_in_new_session
    for context in contexts:
        context.close()


def words_of(page: "Page", caption_index: int = 0) -> "Locator":
    return page.locator(".caption").nth(caption_index).locator(".word")


def first_caption(page: "Page") -> str:
    words_of(page).first.wait_for(timeout=TIMEOUT)
    return page.locator(".caption").first.inner_text()


@contextmanager
def new_image(page: "Page") -> Iterator[None]:
    """Wait, after the body, until the viewer shows a new image."""
    page.locator(".attention-overlay img").first.evaluate(
        """image => {
            const before = image.src;
            window.imageChanged = new Promise((resolve, reject) => {
                setTimeout(() => reject(new Error("the image does not change")), 30000);
                const observer = new MutationObserver(() => {
                    if (image.src !== before) {
                        observer.disconnect();
                        resolve();
                    }
                });
                observer.observe(image, { attributes: true, attributeFilter: ["src"] });
            });
        }"""
    )
    yield
    page.evaluate("window.imageChanged")


def start_put(url: str, cookies: list[dict[str, str]], num_bytes: int) -> HTTPConnection:
    """Send the headers of an upload of `num_bytes`, as the page does."""
    token = next(cookie["value"] for cookie in cookies if cookie["name"] == "_streamlit_xsrf")
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=60)
    connection.putrequest("PUT", parts.path)
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(num_bytes))
    connection.putheader("Cookie", f"_streamlit_xsrf={token}")
    connection.putheader("X-Xsrftoken", token)
    connection.endheaders()
    return connection


def put(url: str, cookies: list[dict[str, str]], content: bytes) -> tuple[int, str]:
    """Upload a file as the page does, and return status and text of the answer."""
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + content + b"\r\n--b--\r\n"
    with closing(start_put(url, cookies, len(body))) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # the server may answer before it has read the body
            connection.send(body)
        response = connection.getresponse()
        return response.status, response.read().decode()


def bytes_of_uploads(server: Server) -> int:
    """Return the bytes of all uploads that the server holds, which it reports among its metrics."""
    time.sleep(5.5)  # Streamlit caches the metrics for 5 seconds
    metrics = urlopen(f"{server.url}/_stcore/metrics").read().decode()
    return sum(map(int, re.findall(r'cache_type="UploadedFileManager".*} (\d+)$', metrics, re.MULTILINE)))


def wait_until(condition: Callable[[], bool], description: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {description}"
        time.sleep(0.01)


def upload(page: "Page", name: str, content: bytes) -> None:
    page.locator("input[type=file]").first.set_input_files(
        [{"name": name, "mimeType": "image/jpeg", "buffer": content}]
    )


def aspect_ratio(page: "Page") -> float:
    """Return width divided by height of the displayed image."""
    box = page.locator(".attention-overlay").bounding_box()
    assert box is not None
    return box["width"] / box["height"]


def measure_glow(page: "Page") -> tuple[float, float, float]:
    """Return the fraction of the image that glows, and the center of the glow: x and y as fractions of the sides."""
    total, x, y = page.locator(".attention-overlay canvas").first.evaluate(
        """canvas => {
            const { width, height } = canvas;
            const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let total = 0, x = 0, y = 0;
            for (let i = 0; i < width * height; i += 1) {
                const alpha = pixels[4 * i + 3];
                total += alpha, x += alpha * (i % width), y += alpha * Math.floor(i / width);
            }
            return [total / 255 / width / height, x / total / width, y / total / height];
        }"""
    )
    return total, x, y


def settled_glow(page: "Page") -> tuple[float, float, float]:
    """Return the glow once it stops changing."""
    glows = [measure_glow(page)]

    def is_settled() -> bool:
        time.sleep(0.1)
        glows.append(measure_glow(page))
        return glows[-1] == glows[-2] and glows[-1][0] > 0

    wait_until(is_settled, "the glow settles")
    return glows[-1]


def test_words_of_an_uploaded_image_show_attention_without_the_server(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: socket.on("framesent", lambda _: requests.append(socket.url)))
    page.reload()
    assert len(first_caption(page).split()) > 1  # the caption of the first sample
    with new_image(page):
        upload(page, "photo.jpg", encode_jpeg(red_blue_image(640, 427)))
    assert aspect_ratio(page) == pytest.approx(640 / 427, rel=0.02)

    active = page.locator(".attention-overlay.active")
    assert active.count() == 0
    assert {urlsplit(url).hostname for url in requests if url.startswith(("http", "ws"))} == {"127.0.0.1"}
    requests.clear()
    words_of(page).nth(0).hover()
    fraction, x, y = settled_glow(page)
    assert 0 < fraction < 0.9
    assert active.count() == 1
    word = words_of(page).nth(0).inner_text()
    assert re.fullmatch(rf"{word} · \d+%", page.locator(".viewer .status").inner_text())
    glow_centers = {(round(x, 2), round(y, 2))}
    for index in range(1, min(6, words_of(page).count())):
        words_of(page).nth(index).hover()
        _, x, y = settled_glow(page)
        glow_centers.add((round(x, 2), round(y, 2)))
    assert len(glow_centers) > 2
    page.mouse.move(0, 0)
    active.wait_for(state="detached")
    assert requests == []


def test_keys_and_touch_activate_words(open_page: Callable[..., "Page"]) -> None:
    page = open_page(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 844})
    first_caption(page)
    active = page.locator(".word[aria-pressed=true]")
    words_of(page).nth(1).tap()
    assert words_of(page).nth(1).get_attribute("aria-pressed") == "true"
    assert active.count() == 1
    page.locator(".attention-overlay").tap()
    assert active.count() == 0
    words_of(page).nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert words_of(page).nth(1).get_attribute("aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert active.count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_play_activates_one_word_after_the_other(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    play = page.locator(".play")
    play.click()
    for index in range(3):
        wait_until(lambda: words_of(page).nth(index).get_attribute("aria-pressed") == "true", f"word {index}")  # noqa: B023
    assert page.locator(".word[aria-pressed=true]").count() == 1
    assert page.locator(".attention-overlay.active").count() == 1
    play.click()
    assert page.locator(".word[aria-pressed=true]").count() == 0
    assert play.inner_text() == "▶"


@pytest.mark.parametrize("select", ["hover", "focus"])
def test_selecting_a_word_stops_play(open_page: Callable[..., "Page"], select: str) -> None:
    page = open_page()
    first_caption(page)
    play = page.locator(".play")
    play.click()
    assert play.inner_text() == "■"
    getattr(words_of(page).nth(2), select)()
    wait_until(lambda: play.inner_text() == "▶", "stopped playback")
    assert words_of(page).nth(2).get_attribute("aria-pressed") == "true"


def test_alternatives_follow_the_search_settings_and_show_attention(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    rows = page.locator(".alternatives li")
    assert rows.count() == DEFAULT_SEARCH.beam_size - 1
    scores = [float(row.locator(".score").inner_text().split("·")[1]) for row in rows.all()]
    assert scores == sorted(scores, reverse=True)
    rows.nth(1).locator(".word").nth(0).hover()
    assert settled_glow(page)[0] > 0

    slider = page.get_by_role("slider", name="Beam size")
    slider.focus()
    slider.press("ArrowRight")
    wait_until(lambda: rows.count() == DEFAULT_SEARCH.beam_size, "a wider beam gives one more alternative")
    page.get_by_role("combobox", name="Method").click()
    page.get_by_role("option", name="sample").click()
    page.get_by_role("slider", name="Temperature").wait_for()
    wait_until(lambda: rows.count() == 2, "three captions are sampled")
    assert page.get_by_role("slider", name="Beam size").count() == 0
    assert page.get_by_test_id("stAlert").count() == 0


def test_two_models_are_compared_and_captions_are_text(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    page.get_by_role("combobox", name="Compare with").click()
    page.get_by_role("option", name="markup").click()
    words_of(page, 1).first.wait_for(timeout=TIMEOUT)
    assert set(page.locator(".caption").nth(0).inner_text().split()) <= set(WORDS)
    assert set(page.locator(".caption").nth(1).inner_text().split()) <= set(MARKUP)
    assert page.locator(".caption b, .caption img, li b, li img").count() == 0
    assert page.title() == "gridcap"
    for index, pattern in enumerate((r".+ · \d+%", r".+ · \d+% · sentinel \d+%")):
        words_of(page, index).first.hover()
        assert re.fullmatch(pattern, page.locator(".viewer .status").nth(index).inner_text())


def test_controls_start_from_the_recorded_settings_of_the_model(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    slider = page.get_by_role("slider", name="Beam size")
    assert slider.input_value() == str(DEFAULT_SEARCH.beam_size)
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="markup").click()
    wait_until(lambda: slider.input_value() == "3", "the slider shows the recorded beam size")
    wait_until(lambda: page.locator(".alternatives li").count() == 2, "the recorded beam size is used")


def test_unreadable_image_is_reported_and_the_next_image_captioned(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    alert = page.get_by_test_id("stAlert")
    for name, content, details in (
        ("broken.jpg", b"\xff\xd8\xff\xe0 and no more", "JPEG, PNG"),
        ("cut.jpg", encode_jpeg(red_blue_image(800, 600))[:3000], "truncated"),
        ("*b* <b>old.png", b"GIF", "JPEG, PNG"),
        ("\x1b[31mred.png", b"GIF", "JPEG, PNG"),
        ("bomb.png", png_bomb(10_000, 10_000), "10000 x 10000"),
    ):
        upload(page, name, content)
        prefix = f"{printable(name)}: "
        wait_until(lambda: [text.startswith(prefix) for text in alert.all_inner_texts()] == [True], name)  # noqa: B023
        assert details in alert.inner_text()
        assert page.locator(".viewer").count() == 0
    upload(page, "whole.jpg", encode_jpeg(red_blue_image(320, 200)))
    assert first_caption(page)
    assert alert.count() == 0


def test_images_of_all_kinds_are_captioned_without_writing_a_file(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    rotated = Image.Exif()
    rotated[ExifTags.Base.Orientation] = 6
    animation = {"save_all": True, "append_images": [Image.new("RGB", (64, 48))]}
    images = {
        "rotated.jpg": encode_jpeg(red_blue_image(320, 200), exif=rotated),
        "gray.jpg": encode_jpeg(red_blue_image(300, 200).convert("L")),
        "cmyk.jpg": encode_jpeg(red_blue_image(310, 200).convert("CMYK")),
        "transparent.png": encode_image(Image.new("RGBA", (200, 300), (0, 0, 0, 0)), "PNG"),
        "16-bit.tif": encode_image(Image.fromarray(np.full((90, 120), 40_000, dtype=np.uint16)), "TIFF"),
        "animation.gif": encode_image(red_blue_image(64, 48), "GIF", **animation),
        "large.jpg": encode_jpeg(Image.effect_noise((1500, 1000), 90), quality=97),
    }
    assert len(images["large.jpg"]) > 2**20  # Starlette would spool it to a file by default
    for name, content in images.items():
        with new_image(page):
            upload(page, name, content)
        assert page.get_by_test_id("stAlert").count() == 0
        if name == "rotated.jpg":
            assert aspect_ratio(page) < 1
    # The server cannot write files, so any attempt would have shown an error.


def test_image_is_pasted_or_chosen_from_the_samples(open_page: Callable[..., "Page"]) -> None:
    page = open_page()
    first_caption(page)
    with new_image(page):
        page.evaluate(
            """content => {
                const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
                const clipboardData = new DataTransfer();
                clipboardData.items.add(new File([bytes], "image.png", { type: "image/png" }));
                document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
            }""",
            base64.b64encode(encode_image(red_blue_image(400, 100), "PNG")).decode(),
        )
    assert aspect_ratio(page) == pytest.approx(4, rel=0.02)
    samples = page.locator(".samples button")
    assert samples.count() > 3
    with new_image(page):
        samples.nth(2).click()


def test_page_is_drawn_while_another_session_waits_for_a_caption(open_page: Callable[..., "Page"]) -> None:
    waiting, other = open_page(), open_page("training")
    first_caption(waiting)
    other.get_by_text("Current run").wait_for()
    waiting.get_by_role("combobox", name="Model").click()
    waiting.get_by_role("option", name="slow").click()
    spinner = waiting.get_by_test_id("stSpinner")
    spinner.wait_for()
    other.get_by_role("link", name="Captions").click()
    other.locator(".samples button").first.wait_for()
    assert spinner.count() == 1
    spinner.wait_for(state="detached", timeout=TIMEOUT)
    first_caption(other)


def test_training_page_follows_the_run(open_page: Callable[..., "Page"], server: Server) -> None:
    curve = server.folder / "results" / "live" / "plots" / "metrics" / "train" / "loss.tsv"
    page = open_page("training")
    page.get_by_text("There are no metrics").wait_for()
    curve.parent.mkdir(parents=True)
    curve.write_text("step\tloss\n10\t3.5\n20\t2.25\n")
    tiles = page.get_by_test_id("stMetricValue")
    wait_until(lambda: tiles.all_inner_texts() == ["20", "2.250"], "the run is shown")
    page.get_by_text("running").wait_for()
    with curve.open("a") as file:
        file.write("30\t1.125\n4")  # the last row is incomplete
    wait_until(lambda: tiles.all_inner_texts() == ["30", "1.125"], "the new row is shown")


def test_upload_is_dropped_once_the_page_has_read_it(
    open_page: Callable[..., "Page"], server: Server, tmp_path: Path
) -> None:
    page = open_page()
    first_caption(page)
    path = tmp_path / "a.jpg"
    for width in (320, 330, 340):
        jpeg = encode_jpeg(red_blue_image(width, 200))
        path.write_bytes(jpeg + bytes(19 * 2**20 - len(jpeg)))  # decoders ignore what follows the image
        with new_image(page):
            page.locator("input[type=file]").first.set_input_files(path)
    assert bytes_of_uploads(server) == 0


def test_unrequested_uploads_are_refused(open_page: Callable[..., "Page"], server: Server) -> None:
    page = open_page()
    first_caption(page)
    with new_image(page), page.expect_request(lambda request: request.method == "PUT") as request:
        upload(page, "a.jpg", encode_jpeg(red_blue_image(320, 200)))
    session_url = request.value.url.rpartition("/")[0]
    cookies = page.context.cookies()
    unrequested = [f"{session_url}/unrequested-{index}" for index in range(20)]
    for url in (*unrequested, request.value.url, f"{server.url}/_stcore/upload_file/no-session/unrequested"):
        status, answer = put(url, cookies, bytes(2**20))
        assert (status, answer) == (403, "no page requested this upload. Reload the page.")
    assert bytes_of_uploads(server) == 0


def test_uploads_of_a_session_are_limited_while_they_arrive(open_page: Callable[..., "Page"], server: Server) -> None:
    page = open_page()
    first_caption(page)
    page.route("**/_stcore/upload_file/**", lambda route: route.abort())
    with page.expect_request(lambda request: request.method == "PUT") as request:
        upload(page, "a.jpg", encode_jpeg(red_blue_image(320, 200)))
    url, cookies = request.value.url, page.context.cookies()
    with ExitStack() as stack:
        # Each announces a file and sends none of it.
        uploads = [stack.enter_context(closing(start_put(url, cookies, 19 * 2**20))) for _ in range(4)]
        answered, _, _ = select.select([upload.sock for upload in uploads], [], [], 30)
        [refused] = [upload for upload in uploads if upload.sock in answered]
        response = refused.getresponse()
        assert response.status == 413
        assert response.read() == b"this page holds too many images (limit 60 MB). Reload the page."
    wait_until(lambda: put(url, cookies, bytes(2**20))[0] == 204, "the memory is released")


@pytest.mark.parametrize("is_captioning", [False, True], ids=["idle", "captioning"])
@pytest.mark.parametrize(
    ("signum", "status", "message"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, -signal.SIGTERM, "")]
)
def test_signal_ends_the_app_without_a_traceback(
    chromium: "Browser",
    slow_model: Path,
    tmp_path: Path,
    signum: signal.Signals,
    status: int,
    message: str,
    is_captioning: bool,
) -> None:
    # The app captions an image as it starts, so an idle one has a fast model.
    model = slow_model if is_captioning else write_random_model(tmp_path / "fast", "resnet50", "layer4", 64, WORDS)
    with serve_app(tmp_path, model) as server:
        assert server.process.stdout is not None
        if is_captioning:
            page = chromium.new_page()
            page.goto(server.url)
            page.get_by_test_id("stSpinner").get_by_text("Captioning").wait_for(timeout=TIMEOUT)
        server.process.send_signal(signum)
        assert server.process.wait(timeout=20) == status
        assert server.process.stdout.read().lstrip("\n") == message
