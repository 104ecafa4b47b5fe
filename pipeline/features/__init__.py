"""Features: from image files to stored grids of region features."""
