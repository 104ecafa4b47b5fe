import base64

import numpy as np
import pytest

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.components import escape_markdown, jpeg_url


def test_markdown_characters_are_escaped() -> None:
    assert escape_markdown("a_*b*.jpg") == r"a\_\*b\*\.jpg"
    assert escape_markdown("naïve 2") == "naïve 2"


def test_jpeg_url_holds_the_bytes() -> None:
    content = np.arange(256, dtype=np.uint8).tobytes()
    prefix, encoded = jpeg_url(content).split(",")
    assert prefix == "data:image/jpeg;base64"
    assert base64.b64decode(encoded) == content
