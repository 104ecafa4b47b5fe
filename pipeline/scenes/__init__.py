"""The embedded dataset: rendered scenes with captions and annotated objects, and the training of its encoder."""
