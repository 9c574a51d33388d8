"""Is a defense durable, or does it only look so? Attacks, sweeps, a verdict."""
