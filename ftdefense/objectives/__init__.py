"""Pure functions of outputs and batches: losses and distances."""
