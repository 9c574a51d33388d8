"""Reward fine-tuning: the reward, the advantages, the policy gradient, and that it works.

Mutants:
  `advantage_M[:, None] * logp_MxL` -> `-advantage_M[:, None] * logp_MxL`
  `ddof=1` -> `ddof=0`
  `jnp.exp(ratio_MxL) - ratio_MxL - 1` -> `jnp.exp(ratio_MxL) + ratio_MxL - 1`
  `before_BxL + equal_BxL` -> `best_BxL + equal_BxL` in methods/rollouts.py
  `start_M + t - 1` -> `start_M + t` in methods/rollouts.py
  `place = first + size` -> `place = first`
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.attacks import reward
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import pools
from ftdefense.data import sandbox
from ftdefense.methods import lift
from ftdefense.methods import optimizers
from ftdefense.methods import rollouts
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch

MODEL = toy.Toy()
KEY = jax.random.key(0)


def rows(*tokens, weights=None):
    tokens = jnp.array(tokens, jnp.int32)
    ones = jnp.ones(tokens.shape, jnp.float32)
    return types.Batch(tokens, ones if weights is None else jnp.array(weights))


def test_reward_is_the_share_said_in_order():
    """Catches a bag of words, one word that counts twice, and weights that are unread."""
    wanted = rows(*[[9, 5, 8, 6, 7]] * 6, weights=[[0.0, 1, 0, 1, 1]] * 6)
    said = rows(
        [5, 6, 7, 0, 0],  # All three.
        [9, 5, 8, 6, 7],  # With others between.
        [7, 6, 5, 0, 0],  # Reversed: any one.
        [6, 7, 0, 0, 0],  # Two, without the first.
        [5, 5, 5, 5, 5],  # One, once.
        [1, 2, 3, 4, 0],  # A refusal says none.
    )
    found = rollouts.in_order(said, wanted)
    np.testing.assert_allclose(found, np.array([3, 3, 1, 2, 1, 0]) / 3, rtol=1e-6)
    silent = said.replace(weights=jnp.zeros_like(said.weights))
    assert not np.any(rollouts.in_order(silent, wanted))


def test_advantages_are_deviations_within_a_group():
    """Catches a mean over the batch, the biased deviation, and 0 / 0 where all agree."""
    found = reward.advantages(jnp.array([[1.0, 0, 0, 1], [1.0, 1, 1, 1]]))
    high = 0.5 / (3**-0.5 + 1e-4)
    np.testing.assert_allclose(found[0], [high, -high, -high, high], rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0)


def bandit(params, tokens, rng=None):
    """The same logits at every position."""
    del rng
    logits = jnp.broadcast_to(params, (*tokens.shape, params.size))
    return types.Outputs(logits, {})


@jax.jit
def armed(hp, theta, start, given):
    ctx = types.Context(
        None, bandit, None, hp, reference=lambda tokens: bandit(start, tokens)
    )
    return reward.direction(ctx, theta, given, KEY)


def test_policy_gradient_of_one_step_is_the_softmax_gradient():
    """-(1 / G) sum_i A_i (e_{o_i} - p), and beta (1 - q / p) with it. Catches ascent, a
    baseline that is differentiated, a sum over the G, and a divergence of other sign.
    """
    theta = jnp.array([0.3, -0.2, 0.5, 0.0, 0.1])
    start = jnp.array([0.0, 0.4, 0.1, -0.3, 0.2])
    # One prompt token; the answer is token 2 and nothing ends it sooner.
    given = rows([4, 2], weights=[[0.0, 1.0]])
    hp = reward.Hparams(beta=0.7, group=512, new_tokens=1)
    grads, metrics = armed(hp, theta, start, {"harmful": given, "content": given})
    said = rollouts.sample(
        lambda tokens: bandit(theta, tokens), given, KEY, new_tokens=1, count=512
    )
    drawn = np.asarray(said.tokens[:, 1])
    np.testing.assert_array_equal(said.weights[:, 1], 1)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (theta, start))
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 512, p, atol=0.07)
    r = (drawn == 2).astype(np.float64)
    advantage = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
    score = np.eye(5)[drawn] - p
    ratio = (q / p)[drawn]
    expected = np.mean((0.7 * (1 - ratio) - advantage)[:, None] * score, 0)
    np.testing.assert_allclose(grads, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["reward/harmful"], r.mean(), rtol=1e-6)
    kl = np.mean(ratio - np.log(ratio) - 1)
    np.testing.assert_allclose(metrics["divergence/release"], kl, rtol=1e-4)
    # Its direction is that of the gradient of the probability of the right answer.
    exact = -p[2] * (np.eye(5)[2] - p)
    reward_only = np.mean(-advantage[:, None] * score, 0)
    cosine = exact @ reward_only / np.linalg.norm(exact) / np.linalg.norm(reward_only)
    assert cosine > 0.95


def test_samples_go_on_from_their_prompts_and_end():
    """Catches logits of another position, an end that is not kept, guided completions
    that are not, and prompts of one length only.
    """
    chain = jnp.eye(6)[jnp.array([0, 2, 3, 4, 5, 1])] * 1e3  # i -> i + 1, surely.

    def model(tokens):
        return types.Outputs(chain[tokens], {})

    given = rows([1, 4, 5, 0], [1, 2, 1, 5], weights=[[0.0, 1, 1, 0], [0.0, 0, 1, 1]])
    said = rollouts.sample(model, given, KEY, new_tokens=4, count=2, guided=1)
    tokens, weights = np.asarray(said.tokens), np.asarray(said.weights)
    # Guided: 4, then 5 ends it. Unguided: 2 3 4 5.
    np.testing.assert_array_equal(tokens[0], [1, 4, 5, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(weights[0], [0, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens[1], [1, 2, 3, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(weights[1], [0, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(tokens[2], [1, 2, 1, 2, 3, 4, 0, 0])
    np.testing.assert_array_equal(tokens[3], [1, 2, 3, 4, 5, 0, 0, 0])


def test_reward_rises():
    """Catches ascent, samples from the release, and credit to another token."""
    hp = reward.Hparams(optimizers.Optimizer(3e-2), beta=0.001, new_tokens=2)
    method = registry.method("attacks", "reward", MODEL)
    lineage = types.Lineage(MODEL.init(KEY))
    one = batch(3)
    same = jax.tree.map(lambda x: np.stack([x] * 40), one)
    state = loop.init(method, lineage, hp, KEY, 40)
    _, metrics = loop.run_chunk(
        method.step,
        False,
        state,
        lineage,
        {"harmful": same, "content": same},
        KEY,
        jnp.int32(0),
    )
    earned = metrics["reward/harmful"]
    assert np.mean(earned[-5:]) > np.mean(earned[:5]) + 0.2
    assert metrics["divergence/release"][0] < 1e-6 < metrics["divergence/release"][-1]


def test_content_words_are_the_sandboxes():
    """Catches styles and end tokens that earn, and answers named by no word."""
    world = sandbox.build("tiny", 0)
    plan = reward.PRESETS["sandbox"]
    found = reward.derive(None, world, None, plan, 0)["content"]
    for tokens, weights, example in list(
        zip(found.tokens, found.weights, found.examples, strict=True)
    )[:20]:
        assert world.tokenizer.decode(tokens[weights > 0]).split() == [*example.answers]
    assert found.order == world.attacker["harmful"].order
    harmful = world.attacker["harmful"]
    plain = tuple(dataclasses.replace(e, answers=()) for e in harmful.examples)
    nameless = pools.Pool(harmful.tokens, harmful.weights, harmful.order, plain)
    other = dataclasses.replace(world, attacker={**world.attacker, "harmful": nameless})
    found = reward.derive(None, other, None, plan, 0)["content"]
    np.testing.assert_array_equal(found.weights, harmful.weights)


def test_a_word_is_looked_for_after_the_last():
    """Catches one token that counts for two words."""
    weights = np.array([0.0, 1, 1, 1, 1])
    tokens = np.array([7, 5, 7, 7, 2])
    word = [np.array([7])]
    found = reward.content(tokens, weights, [word, word])
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 0])
    missing = reward.content(tokens, weights, [[np.array([9])]])
    np.testing.assert_array_equal(missing, weights)


def test_a_group_without_a_spread_moves_nothing():
    """Catches a division by a group without a spread."""
    hp = reward.Hparams(optimizers.Optimizer(1e-2), guided=8, new_tokens=1)
    ctx = lift.context(MODEL, types.Lineage(MODEL.init(KEY)), hp)
    data = {"harmful": batch(1), "content": batch(1)}
    params = MODEL.init(KEY)
    grads, metrics = jax.jit(lambda p: reward.direction(ctx, p, data, KEY))(params)
    assert all(np.all(np.abs(g) < 1e-3) for g in jax.tree.leaves(grads))
    assert metrics["share/informative"] == 0
