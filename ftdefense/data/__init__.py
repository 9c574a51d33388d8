"""From text to batches of token ids and loss weights."""
