import pytest

pytest.importorskip("streamlit", reason="needs Streamlit: pip install 'gridcap[app]'")

from pipeline.app.components import escape_markdown


def test_markdown_characters_are_escaped() -> None:
    assert escape_markdown("a_*b*.jpg") == r"a\_\*b\*\.jpg"
    assert escape_markdown("naïve 2") == "naïve 2"
