"""NEVER: a control that never knew the restricted skill: the floor of true removal.

Stage        alignment, of a twin pretrained without the skill (sandbox only).
Starts from  never
Template     none
Strategy     none
Minimises    L(alignment), as `none`.
Source       DESIGN: specs/attacks.md 1.6.
Evidence     DESIGN
Reduces to   `none`, from another pretraining.
Cost         1 forward, 1 backward.
"""

from ftdefense.defenses import none

STARTS_FROM = "never"
Hparams = none.Hparams
method = none.method
PRESETS = {"sandbox": none.PRESETS["sandbox"]}
