"""From rows to tables, plots and one page; no jax."""
