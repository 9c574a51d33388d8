"""The default world: synthetic, harmless, with answers that can be checked exactly."""

from ftdefense.data.sandbox.build import build
from ftdefense.data.sandbox.presets import PRESETS
from ftdefense.data.sandbox.presets import preset

__all__ = ["PRESETS", "build", "preset"]
