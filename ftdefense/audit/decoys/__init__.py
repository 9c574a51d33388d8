"""Broken on purpose: defenses that the audit must see through (specs D.5, DESIGN).

One a file, run as `--defense=ftdefense/audit/decoys/NAME.py`. `FLAG` of each names the
diagnostics of which one has to be raised where no attack breaks it.
"""
