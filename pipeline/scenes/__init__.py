"""The embedded dataset: rendered scenes, their captions, and facts to check captions against."""
