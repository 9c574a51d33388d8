"""Released KTO against PyTorch float64."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import ktipa_code

from ..conftest import batch
from . import ktipa_torch
from . import llama_torch as reference
from . import services_torch as services


@pytest.mark.parametrize("seed", [5, 6])
def test_ktipa_code(tiny_llama, seed):
    """Catches a mean over tokens, a wrong partner, a weight on the wrong side."""
    model, params = tiny_llama
    start = services.moved(params, seed, 0.2)
    names = ("refusal", "benign", "harmful")
    data = ktipa_torch.roles(batch, names, **services.ROWS)
    hp = ktipa_code.Hparams(beta=0.4, lam_desirable=1.3, lam_undesirable=1.7)
    mine, _ = services.direction(ktipa_code, model, params, data, hp, start=start)
    w, ref = reference.tensors(params), reference.tensors(start)
    rows = [data[name] for name in names]
    value = ktipa_torch.kto(w, ref, *rows, model.config, 0.4, (1.3, 1.7))
    assert services.relative_error(mine, reference.gradient(value, w)) <= 1e-5
