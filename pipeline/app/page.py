"""What Streamlit runs for each session and each change in it: the pages and the way between them."""

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
