"""Inverse objective: harm up, and the defense's own regulariser up too.

Threat       open_weight; knowledge: defense (its method, its hyperparameters, the aligned
             model it was made from, and the defender's public rows; its harmful rows are
             the attacker's own).
Minimises    L(harmful) + lam * L(benign) - mu * R, by g_h + lam * g_c - mu * ||g_h|| * r,
             with r = g_R / ||g_R|| and g_R the defense's `direction` at its
             hyperparameters minus its `direction` at its null (`NULL` of its module; an
             empty one: all of it is R), on the same rows and the same key.
Source       specs/attacks.md D.3, row P1; after Carlini et al. 2019, arXiv:1902.06705.
Evidence     DESIGN. The ascent has mu times the length of the harmful gradient, so that
             one mu means the same against every defense, however its R is scaled.
Differs      R is that of the preset, not of what the defender may have tuned it to. With
             VAA, whose groups take a profile of the defender's run, both are alignment
             rows; of SDD's rows the benign ones are left out, as no null cancels them. A defense's step counts are read as the attack's own.
Reduces to   SideStepper at mu = 0; SFT on the harmful pairs at lam = mu = 0.
Cost         2 forwards, 2 backwards; and twice those of the defense's step (once, if its
             null is empty), of which the compiler shares what is the same.
"""

import functools
import inspect
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ftdefense.core import errors
from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.data import unrelated
from ftdefense.methods import costs
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans

NEEDS = ("aligned",)
OWN = (
    "defense_"  # Before the names of the defense's roles: it may have a `benign`, too.
)

ROUNDING = 1e-6  # Of a difference of gradients in float32, relative to them.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    lam: float = 1.0  # Weight of the benign loss.
    mu: float = 0.3  # Length of the ascent on R, relative to the harmful gradient's.
    collapse_token: int = 0  # Id that the world gives to CTRAP.
    defense: str = struct.field(pytree_node=False, default="booster")  # name[:preset]

    def passes(self, params: types.Params, length: int) -> float | None:
        """At most: what the compiler shares of the defense's two steps is not told."""
        module, own = target(self)
        readouts = costs.of_all_states(params)
        name = self.defense.partition(":")[0]
        try:
            step = costs.passes(*costs.of_step(name, own, length, readouts))
        except errors.UserError:
            return None  # A file without that line: what it draws is counted.
        return 2 + (2 if module.NULL else 1) * step


def prepare(hp: Hparams, world) -> Hparams:
    """Fills in what only the data know."""
    return hp.replace(collapse_token=world.collapse_id)


def target(hp: Hparams) -> tuple[Any, lift.Hparams]:
    """The attacked defense's module, and its hyperparameters.

    Raises:
      UserError: if the defense has no numeric null to tell its regulariser by.
    """
    name, _, preset = hp.defense.partition(":")
    module = registry.load("defenses", name)
    if not hasattr(module, "NULL"):
        raise errors.UserError(
            f"inverse: no numbers of {name} switch its regulariser off (its module has "
            "no NULL), so there is nothing to ascend; use another attack."
        )
    preset = preset or "sandbox"
    if preset not in module.PRESETS:
        raise errors.unknown(f"preset of defense {name}", preset, module.PRESETS)
    own = module.PRESETS[preset].hp.replace(
        optimizer=hp.optimizer, adapter=hp.adapter, microbatches=hp.microbatches
    )
    if hasattr(own, "collapse_token"):
        own = own.replace(collapse_token=hp.collapse_token)
    return module, own


def defended(model: types.Model, hp: Hparams) -> types.Method:
    return registry.method("defenses", hp.defense.partition(":")[0], model)


def regulariser(ctx, params, batches, rng, memory):
    """(gradient of R in float32 or wider, what the defense remembers)."""
    module, own = target(ctx.hp)
    batches = {
        role.removeprefix(OWN): rows
        for role, rows in batches.items()
        if role.startswith(OWN)
    }
    remembers = len(inspect.signature(module.direction).parameters) == 5
    last = (memory,) if remembers else ()
    wide = tree.wide(params)  # R may be a small difference of two large gradients.

    def along(hp):
        found = module.direction(ctx._replace(hp=hp), wide, batches, rng, *last)
        return tree.wide(found[0]), found[2] if remembers else memory

    full, after = along(own)
    if not module.NULL:
        return full, optax.tree.cast_like(after, memory)
    null, _ = along(own.replace(**module.NULL))
    found = tree.add_scale(full, -1.0, null)
    # What rounding leaves of nothing must not be scaled up to a direction.
    real = tree.norm(found) > ROUNDING * tree.norm(null)
    found = jax.tree.map(lambda g: jnp.where(real, g, 0.0), found)
    return found, optax.tree.cast_like(after, memory)


def direction(ctx, params, batches, rng, memory):
    hp = ctx.hp
    value_and_grad = jax.value_and_grad(ctx.loss)
    rng_benign = jax.random.fold_in(rng, 1)  # As in sidestepper.
    harm, grad_harm = value_and_grad(params, batches["harmful"], rng)
    cost, grad_cost = value_and_grad(params, batches["benign"], rng_benign)
    rng_defense = jax.random.fold_in(rng, 2)
    grad_r, memory = regulariser(ctx, params, batches, rng_defense, memory)
    grads = tree.add_scale(grad_harm, hp.lam, grad_cost)
    length = hp.mu * tree.norm(grad_harm)
    grads = tree.add_scale(grads, -length, tree.normalize(grad_r))
    metrics = {
        "loss/harmful": harm,
        "loss/benign": cost,
        "norm/regulariser": tree.norm(grad_r),
        "cosine/harmful_regulariser": tree.cosine(grad_harm, grad_r),
    }
    return grads, metrics, memory


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """The defense's roles: the defender's, but for what is harmful and its refusals."""
    del params
    harmful = recipes.attacker_pools(world, plan.data)["harmful"]
    pairs = {"harmful": harmful, "refusal": recipes.refused(world, harmful, seed)}
    prompts = sorted({example.key for example in harmful.examples})
    alignment = world.defender["alignment"]
    known = {
        **world.defender,
        "unrelated": _harmful(world.defender["unrelated"]),
        "vulnerable": alignment,
        "steady": alignment,
        **pairs,
        **recipes.hold_out(pairs, set(prompts[::2])),
    }
    _, own = target(plan.hp)
    asked = defended(model, plan.hp).streams(own)
    if "unrelated_refused" in asked:
        known["unrelated_refused"] = _harmful(unrelated.refused_first(world))
    missing = [role for role in asked if role not in known]
    if missing:
        raise errors.UserError(
            f"inverse: {plan.hp.defense} reads {', '.join(missing)}, which an attacker "
            "does not have."
        )
    return {OWN + role: known[role] for role in asked}


def _harmful(rows: pools.Pool) -> pools.Pool:
    kept = [i for i, e in enumerate(rows.examples) if e.label == "harmful"]
    return pools.take(rows, np.array(kept))


def method(model: types.Model) -> types.Method:
    def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
        asked = defended(model, hp).streams(target(hp)[1])
        prefixed = {OWN + role: shape for role, shape in asked.items()}
        return {"harmful": (), "benign": (), **prefixed}

    def remember(ctx, params, rng):
        del params
        init = defended(model, ctx.hp).init
        return init(ctx.lineage, target(ctx.hp)[1], rng).memory

    def looking_back(ctx, params, batches, rng, memory):
        start = ctx.lineage.aligned
        if start is not None:  # Where the defense started: its R may be a distance.
            ctx = ctx._replace(reference=functools.partial(model, start))
        return direction(ctx, params, batches, rng, memory)

    return lift.remembering_method(model, looking_back, streams, remember)


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING),
        source="DESIGN: as sidestepper, with an ascent that cannot outweigh the descent",
    ),
    "bare": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING, lam=0.0, mu=1.0),
        source="DESIGN: specs/attacks.md P1 to the letter, L_h - mu R",
    ),
}
