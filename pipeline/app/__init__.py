"""The Streamlit app: a page that captions images, and a page that shows the progress of training."""
