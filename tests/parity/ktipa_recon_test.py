"""Both phases of KT-IPA against PyTorch float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")

from ftdefense.defenses import ktipa_recon
from ftdefense.objectives import random_mapping

from ..conftest import batch
from . import hidden_torch
from . import ktipa_torch
from . import llama_torch as reference
from . import services_torch as services

NAMES = ("heldout_refusal", "benign", "heldout", "retain", "adversary")


@pytest.mark.parametrize("mapping_share", [0.0, 1.0])
def test_ktipa_recon(tiny_llama, mapping_share):
    """Catches layers or positions left out, padding that attends to padding, and the
    start as KTO's reference.
    """
    model, params = tiny_llama
    data = ktipa_torch.roles(batch, NAMES, **services.ROWS)
    attack = hidden_torch.ragged(data["adversary"])
    data["adversary"] = ktipa_torch.stacked(attack)
    hp = ktipa_recon.Hparams(beta=0.4, alpha=0.3, gamma=0.6, lam_retain=0.5)
    # Two steps in all: step 1 belongs to the phase that the share names.
    hp = hp.replace(optimizer=hp.optimizer.tabulate(2), mapping_share=mapping_share)
    purged = services.moved(params, 5, 0.2)
    mine, _ = services.direction(
        ktipa_recon, model, params, data, hp, memory=purged, step=1
    )
    w, ref = reference.tensors(params), reference.tensors(purged)
    kept = reference.gradient(reference.loss(w, data["retain"], model.config), w)
    if mapping_share:
        table = random_mapping.vectors(attack.tokens, model.config.width)
        table = torch.tensor(np.asarray(table, np.float64))
        loss = ktipa_torch.mapping(w, attack, table, model.config)
        theirs = services.combine((1, kept), (1, reference.gradient(loss, w)))
    else:
        rows = [data[name] for name in NAMES[:3]]
        there = ktipa_torch.attacked(w, [attack], model.config, 0.3)
        here, after = (
            reference.gradient(
                ktipa_torch.kto(at, ref, *rows, model.config, 0.4, (1, 1)), at
            )
            for at in (w, there)
        )
        theirs = services.combine((1, here), (0.6, after), (0.5, kept))
    assert services.relative_error(mine, theirs) <= 1e-5
