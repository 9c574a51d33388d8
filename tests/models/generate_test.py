"""Generation: padding, ends, sampling and compilations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ftdefense.models import generate
from ftdefense.models import transformer

MODEL = transformer.LanguageModel(
    transformer.ModelConfig(
        vocab_size=19, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24
    )
)
forward = jax.jit(MODEL.__call__)
NEVER = 999  # An end token that no row can say.
PAD = 17


@functools.cache
def params():
    return jax.tree.map(lambda x: 2 * x, MODEL.init(jax.random.key(0)))


def prompts():
    """Three prompts of 2, 5 and 4 tokens, padded on the left with a real token."""
    rows = [[3, 9], [1, 2, 3, 4, 5], [7, 7, 2, 11]]
    tokens, mask = np.full((3, 5), 6, np.int32), np.zeros((3, 5), bool)
    for i, row in enumerate(rows):
        tokens[i, -len(row) :], mask[i, -len(row) :] = row, True
    return rows, tokens, mask


def run(tokens, mask, rng=None, *, eos_ids=(NEVER,), new=6, **arguments):
    said = generate.generate(
        MODEL,
        params(),
        tokens,
        mask,
        rng,
        max_new_tokens=new,
        eos_ids=eos_ids,
        pad_id=PAD,
        **arguments,
    )
    return np.asarray(said)


def continued(row, count):
    """Greedy continuation by full forward passes, without cache or padding."""
    row = list(row)
    for _ in range(count):
        # Padding on the right makes no difference, and one shape for all lengths.
        padded = np.asarray([row + [0] * (16 - len(row))])
        row.append(int(jnp.argmax(forward(params(), padded).logits[0, len(row) - 1])))
    return row[-count:]


def test_left_padded_rows_say_what_they_say_alone():
    """Catches attention to padding, and positions that count it."""
    rows, tokens, mask = prompts()
    expected = [continued(row, 6) for row in rows]
    assert len({tuple(row) for row in expected}) > 1
    np.testing.assert_array_equal(run(tokens, mask), expected)


def test_a_row_ends_with_its_end_token_and_is_padded():
    """Catches an end token that is dropped, and a row that goes on after it."""
    _, tokens, mask = prompts()
    free = run(tokens, mask)
    end = int(free[0, 2])
    said = run(tokens, mask, eos_ids=(NEVER, end))
    for row, reference in zip(said, free, strict=True):
        ends = np.flatnonzero(reference == end)
        kept = ends[0] + 1 if ends.size else len(reference)
        np.testing.assert_array_equal(row[:kept], reference[:kept])
        np.testing.assert_array_equal(row[kept:], PAD)


def test_the_loop_stops_when_every_row_has_ended():
    """Catches a loop that runs to the budget: a huge one would take minutes."""
    _, tokens, mask = prompts()
    first = int(run(tokens[:1], mask[:1])[0, 0])
    said = run(tokens[:1], mask[:1], eos_ids=(first,), new=100_000)
    assert said[0, 0] == first and np.all(said[0, 1:] == PAD)


def test_temperature_and_top_p_do_not_recompile():
    """Catches static sampling settings; and greedy equals a tiny nucleus."""
    _, tokens, mask = prompts()
    greedy = run(tokens, mask, jax.random.key(0))
    compiled = generate._generate._cache_size()
    hot = run(tokens, mask, jax.random.key(0), temperature=5.0)
    narrow = run(tokens, mask, jax.random.key(0), temperature=1.0, top_p=1e-6)
    assert generate._generate._cache_size() == compiled
    assert not np.array_equal(hot, greedy)
    np.testing.assert_array_equal(narrow, greedy)


def test_sampling_depends_on_the_key_only():
    """Catches a key that is not folded with the step: all tokens drawn alike."""
    _, tokens, mask = prompts()
    hot = functools.partial(run, tokens, mask, temperature=100.0, new=12)
    one, again, other = (hot(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert len(set(one[0])) > 3


def test_samples_follow_the_tempered_distribution():
    """Catches logits that are multiplied by the temperature."""
    logits = jnp.log(jnp.array([0.6, 0.3, 0.1]))
    rows = jnp.broadcast_to(logits, (20_000, 3))
    drawn = generate.choose_tokens(
        rows, jax.random.key(0), jnp.float32(0.5), jnp.float32(1)
    )
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, np.array([36, 9, 1]) / 46, atol=0.01)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1.0, [0, 1, 2, 3]), (0.8, [0, 1, 3]), (0.5, [1]), (0.0, [1])]
)
def test_nucleus_keeps_the_fewest_that_reach_the_mass(top_p, kept):
    """Catches `<=` for `<` in the mass before a token, and an unsorted mass."""
    probabilities = jnp.array([[0.25, 0.5, 0.0625, 0.1875]])
    cut = generate.nucleus(jnp.log(probabilities), top_p)
    assert list(np.flatnonzero(np.isfinite(cut[0]))) == kept
    np.testing.assert_allclose(cut[0, kept], jnp.log(probabilities)[0, kept])


def test_interventions_steer_generation():
    """Catches a hook that reaches only the prompt, or nothing."""
    rows, tokens, mask = prompts()
    table = params()["lm_head"]["kernel"]
    taps = jnp.stack([jnp.zeros(16), 1e3 * table[:, 4]])

    def steer(hidden, site, layer, tap):
        return hidden + tap[None, None] if site == "resid" else hidden

    said = run(tokens, mask, intervene=steer, taps=taps)
    np.testing.assert_array_equal(said, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"new": 0}, "max_new_tokens"), ({"temperature": 1.0}, "needs a key")],
)
def test_impossible_requests_are_refused(arguments, message):
    """Catches a default key for sampling: every call would draw the same."""
    _, tokens, mask = prompts()
    with pytest.raises(ValueError, match=message):
        run(tokens, mask, **arguments)


def test_right_padded_prompts_are_refused():
    """Catches the classic mistake: continuations of padding."""
    _, tokens, mask = prompts()
    with pytest.raises(ValueError, match="left"):
        run(tokens, mask[:, ::-1])
