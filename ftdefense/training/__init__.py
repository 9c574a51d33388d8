"""Runs one Method: the loop, its checkpoints, and the pipelines of stages."""
