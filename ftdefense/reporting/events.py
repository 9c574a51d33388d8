"""TensorBoard event files, for those who ask for them."""

from collections.abc import Sequence
import pathlib
from typing import Any

from ftdefense.core import errors


def write(folder: pathlib.Path, log: Sequence[dict[str, Any]]) -> None:
    """Writes one scalar per number of each log entry; entries have a `step`.

    Raises:
      UserError: if tensorboardX is not installed.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise errors.UserError(
            "--tensorboard needs tensorboardX: pip install tensorboardX."
        ) from error
    with tensorboardX.SummaryWriter(str(folder)) as writer:
        for entry in log:
            for name, value in entry.items():
                if name != "step" and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, entry["step"])
