"""One attack a file; found by its file name."""
