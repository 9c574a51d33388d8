"""Signs that a robustness number is not to be trusted: specs/attacks.md D.3."""
