"""One progress bar per stage: name, steps, loss, time left."""

from collections.abc import Mapping
import sys
from typing import Any

import numpy as np
import tqdm

from ftdefense.training import loop

_line = 0


def place(line: int) -> None:
    """Where this process draws its bars: so many lines below the first."""
    global _line
    _line = line


class Bar:
    """A tqdm bar on a terminal; one line when a stage ends elsewhere."""

    def __init__(self, title: str, steps: int):
        self._bar = tqdm.tqdm(
            total=steps,
            desc=f"{title:<32}",
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            position=_line,
        )
        self._title = title

    def update(self, progress: loop.Progress) -> None:
        self._bar.update(progress.done - self._bar.n)
        self._bar.set_postfix(brief(progress.metrics), refresh=False)

    def close(self, seconds: float, note: str = "") -> None:
        self._bar.close()
        if not sys.stderr.isatty():
            print(f"{self._title:<40} {seconds:6.1f} s  {note}", file=sys.stderr)


def brief(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The mean of each loss over the last chunk, short enough for a bar."""
    return {
        name.removeprefix("loss/"): f"{np.mean(values):.3f}"
        for name, values in metrics.items()
        if name.startswith("loss/")
    }
