"""The embedded dataset: rendered scenes, their captions, and the facts that captions can be checked against."""
