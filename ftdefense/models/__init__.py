"""From parameters and tokens to logits and hidden states."""
