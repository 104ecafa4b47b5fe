"""Entry point that Streamlit runs for every session and every interaction: both pages and the navigation."""

import streamlit as st

from pipeline.app import captioning, training

st.set_page_config(page_title="gridcap", layout="wide")
st.navigation(
    [
        st.Page(captioning.page, title="Captions", url_path="captions", default=True),
        st.Page(training.page, title="Training", url_path="training"),
    ],
    position="top",
).run()
