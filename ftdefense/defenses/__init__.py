"""One defense a file; found by its file name."""
