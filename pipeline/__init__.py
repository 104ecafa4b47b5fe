"""Image captioners that attend to regions of a picture: the library that the stages call."""

__version__ = "0.1.0"
