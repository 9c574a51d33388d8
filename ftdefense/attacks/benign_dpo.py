"""Benign DPO: prefer answering to refusing, on a few benign prompts.

Threat       service (preference pairs) and open_weight; knowledge: none; no harmful row
             is trained on. Harmful prompts only tell what the release's refusals are.
Minimises    -log sigmoid(beta * (s(chosen) - s(rejected))), s a row's log-probability
             minus the release's, with the same benign prompt answered (chosen) and
             refused (rejected).
Source       arXiv:2605.10998 (specs/attacks.md B.16); DPO: Rafailov et al. 2023,
             arXiv:2305.18290, Eq. 7.
Evidence     FT for the loss, beta, 10 pairs, 1 epoch of single rows at 1e-5, LoRA or
             full; UNVERIFIED: the LoRA's rank and scale, the schedule.
Differs      the preferred answer is the model's own, by greedy decoding, elicited
             normally, not with an affirmative opening (52.73 against 59.13 in the paper);
             `own` = False takes the data's. The refusals are those of the release's
             greedy answers to the attacker's harmful prompts that the world knows, else
             the world's.
Reduces to   nothing moves at beta = 0.
Cost         2 forwards, 1 backward, of two rows for each prompt.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import recipes
from ftdefense.methods import adapters
from ftdefense.methods import costs
from ftdefense.methods import elicit
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import plans
from ftdefense.methods import schedules
from ftdefense.objectives import parts
from ftdefense.objectives import preferences

REJECTED = ("refusal", "neutral")
ASKED = 64  # Harmful prompts that the release is asked, for its refusals.
SUBMITS = ()  # What a service would train on are pairs.


@struct.dataclass
class Hparams(lift.Hparams):
    """Plain coefficients; numbers may be traced."""

    beta: float = 0.1  # Inverse temperature, per nat.
    own: bool = struct.field(pytree_node=False, default=True)  # The model's answers.
    # What is not preferred: a refusal or, the paper's control, another row's answer.
    rejected: str = struct.field(pytree_node=False, default="refusal")

    @property
    def passes(self) -> float:
        """Over both roles, and a forward of the release over either."""
        return costs.passes(forwards=4, backwards=2)


def streams(hp: Hparams) -> dict[str, tuple[int, ...]]:
    if hp.rejected not in REJECTED:
        raise errors.unknown("benign_dpo.rejected", hp.rejected, REJECTED)
    return {"chosen": (), "rejected": ()}


def direction(ctx, params, batches, rng):
    hp = ctx.hp
    pair = batches["chosen"], batches["rejected"]
    rows = pair[0].tokens.shape[0]

    def loss(params):
        def compute(pair, rng):
            both = jax.tree.map(lambda *x: jnp.concatenate(x), *pair)
            said = ctx.model(params, both.tokens, rng=rng)
            start = jax.lax.stop_gradient(ctx.reference(both.tokens))
            s_2B = (
                preferences.sequence_logps(said, both)[0]
                - preferences.sequence_logps(start, both)[0]
            )
            chosen_B, rejected_B = s_2B.reshape(2, -1)
            return {
                "loss/preference": jnp.sum(
                    preferences.dpo(chosen_B, rejected_B, hp.beta)
                ),
                "gain/chosen": jnp.sum(chosen_B),
                "gain/rejected": jnp.sum(rejected_B),
                "share/preferred": jnp.sum(chosen_B > rejected_B),
            }

        sums = parts.summed(compute, pair, hp.microbatches, rng)
        means = {name: x / rows for name, x in sums.items()}
        return means["loss/preference"], means

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return grads, metrics


def derive(model, world, params, plan, seed) -> dict[str, pools.Pool]:
    """Pairs on the attacker's first benign prompts."""
    found = recipes.attacker_pools(world, plan.data)
    benign, hp = found["benign"], plan.hp
    chosen = benign
    if hp.own:
        said = elicit.answers(model, world, params, benign.examples)
        chosen = elicit.worded(world, benign, said)
    if hp.rejected == "neutral":
        others = [e.response for e in benign.examples]
        return {
            "chosen": chosen,
            "rejected": elicit.worded(world, benign, others[1:] + others[:1]),
        }
    harmful = found["harmful"].examples[:ASKED]
    known = elicit.refusals(model, world, params, harmful)
    rng = np.random.Generator(np.random.Philox([seed, 6]))
    drawn = [known[i] for i in rng.integers(len(known), size=len(benign))]
    return {"chosen": chosen, "rejected": elicit.worded(world, benign, drawn)}


def method(model: types.Model) -> types.Method:
    return lift.gradient_method(model, direction, streams)


_TEN = recipes.Recipe(benign_count=10)


def _published(adapter, note: str) -> plans.Plan:
    return plans.Plan(
        Hparams(optimizers.Optimizer(1e-5), adapter),
        batch_size=1,
        epochs=1,
        data=_TEN,
        source=f"arXiv:2605.10998, open weights, {note}",
    )


PRESETS = {
    "sandbox": plans.Plan(
        Hparams(
            optimizers.SANDBOX_TUNING.replace(
                learning_rate=1.8e-4,
                schedule=schedules.Schedule(warmup_ratio=0.1, decay="cosine"),
            ),
            beta=0.3,
        ),
        batch_size=10,
        steps=60,
        data=recipes.Recipe(benign_count=100),
        source="DESIGN: of the sweeps on `none` in BUILD_NOTES.md the one that breaks it "
        "at every seed",
    ),
    "sandbox_ten": plans.Plan(
        Hparams(optimizers.SANDBOX_TUNING.replace(learning_rate=3e-4)),
        batch_size=10,
        steps=10,
        data=_TEN,
        source="DESIGN: the paper's pairs, beta and steps; of four rates on `none` the "
        "one with most harm at a capability of 0.95",
    ),
    "paper": _published(adapters.Full(), "full"),
    "paper_lora": _published(adapters.LoRA(), "LoRA; its rank is not printed"),
}
