"""Defense-aware optimization: defenses against malicious fine-tuning, and attacks."""

__version__ = "0.1.0"
