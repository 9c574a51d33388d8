"""What to say where a loss cannot be accumulated over parts of a batch."""

from ftdefense.core import errors
from ftdefense.core import types


def refuse(hp: types.Hparams, name: str) -> None:
    """Raises a UserError if `hp.microbatches` is not 1."""
    if hp.microbatches != 1:
        raise errors.UserError(
            f"{name}: microbatches={hp.microbatches}, but its loss is no mean over "
            "the rows of a batch; leave microbatches at 1 and lower the batch size."
        )
