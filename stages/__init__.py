"""One thin command for each DVC stage."""
