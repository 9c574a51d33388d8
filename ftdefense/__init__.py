"""Defense-aware optimization: defenses against malicious fine-tuning, and attacks."""

import os

# Of transformers only tokenizers and chat templates are used: that there is no PyTorch is
# no news, and would stand before every error's one line.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
