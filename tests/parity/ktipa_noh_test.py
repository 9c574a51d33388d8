"""KT-IPA's second stage against PyTorch float64."""

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import ktipa_noh

from ..conftest import batch
from . import ktipa_torch
from . import llama_torch as reference
from . import services_torch as services

NAMES = ("heldout_refusal", "benign", "heldout", "retain", "adversary", "second")


def test_ktipa_noh(tiny_llama):
    """Catches the sign of the attack, a raw step, the attack's rows in the utility."""
    model, params = tiny_llama
    start = services.moved(params, 5, 0.2)
    data = ktipa_torch.roles(batch, NAMES, **services.ROWS)
    attack = data["adversary"], data.pop("second")
    data["adversary"] = ktipa_torch.stacked(*attack)
    hp = ktipa_noh.Hparams(
        beta=0.4, alpha=0.3, gamma=0.6, lam_retain=0.5, inner_steps=2
    )
    mine, _ = services.direction(ktipa_noh, model, params, data, hp, start=start)
    w, ref = reference.tensors(params), reference.tensors(start)
    rows = [data[name] for name in NAMES[:3]]
    there = ktipa_torch.attacked(w, attack, model.config, 0.3)
    here, after = (
        reference.gradient(
            ktipa_torch.kto(at, ref, *rows, model.config, 0.4, (1, 1)), at
        )
        for at in (w, there)
    )
    kept = reference.gradient(reference.loss(w, data["retain"], model.config), w)
    theirs = services.combine((1, here), (0.6, after), (0.5, kept))
    assert services.relative_error(mine, theirs) <= 1e-5
