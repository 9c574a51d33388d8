"""The other kinds of optimizers against PyTorch, and formulas in NumPy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
pytest.importorskip("transformers", reason="needs the extra `parity`")

from ftdefense.attacks import sft
from ftdefense.core import errors
from ftdefense.core import types
from ftdefense.methods import optimizers
from ftdefense.methods import schedules
from ftdefense.models import toy
from ftdefense.training import loop

from ..conftest import batch
from . import optimizer_test as shared

NEW = [k for k in optimizers.KINDS if k not in ("adamw", "adamw_by_leaf", "sgd")]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("kind", "theirs", "fields"),
    [
        ("sgd", functools.partial(torch.optim.SGD, momentum=0.9), {}),
        (
            "sgd",
            functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
            {"nesterov": True, "weight_decay": 0.1},
        ),
        ("adam", torch.optim.Adam, {"weight_decay": 0.1}),
        ("adagrad", torch.optim.Adagrad, {"weight_decay": 0.1}),
        ("adadelta", torch.optim.Adadelta, {"weight_decay": 0.1}),
        ("rmsprop", torch.optim.RMSprop, {"weight_decay": 0.1}),
    ],
    ids=["momentum", "nesterov", "adam", "adagrad", "adadelta", "rmsprop"],
)
def test_equals_pytorch(kind, theirs, fields):
    """Its own defaults. Catches decoupled decay, decay before the clip, optax's 0.1 of

    Adagrad, eps on the wrong side of a root, a Nesterov step of the last momentum, and
    Adam's correction of RMSprop's mean.
    """
    start = shared.drawn(np.random.default_rng(0))
    decay = fields.get("weight_decay", 0.0)
    make = functools.partial(theirs, lr=0.05)
    reference = shared.Theirs(start, make, "cosine", 3, weight_decay=decay)
    schedule = schedules.Schedule(0.25, decay="cosine")
    optimizer = optimizers.of_kind(kind, 0.05, schedule, **fields)
    shared.run(optimizer, reference, start, scales=(1.0, 0.01, 30.0))


def steps(optimizer, start, grads):
    """Parameters after every step, and the last state."""
    optimizer = optimizer.tabulate(len(grads))
    transform = optimizer.transform()
    params = jax.tree.map(jnp.asarray, start)
    state, found, update = transform.init(params), [], jax.jit(transform.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, (optimizer, state)


def drawn(count=4, shape=(3, 2), seed=0):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=shape)}, [
        {"kernel": rng.normal(size=shape)} for _ in range(count)
    ]


def test_lion():
    """Chen et al. 2023. Catches b1 and b2 exchanged, and decay that is coupled."""
    start, grads = drawn()
    optimizer = optimizers.of_kind("lion", 0.1, weight_decay=0.2, clip=jnp.inf)
    found, _ = steps(optimizer, start, grads)
    w, m = start["kernel"], 0.0
    for g, after in zip(grads, found, strict=True):
        g = g["kernel"]
        w = w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + 0.2 * w)
        m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(after["kernel"], w, rtol=1e-9)


def test_sign_and_normalised():
    """Catches a norm over all leaves or over a stack, and a sign before the momentum."""
    rng = np.random.default_rng(0)
    tree = {
        "layers": {"up": rng.normal(size=(2, 3, 2))},
        "head": rng.normal(size=(3, 2)),
    }
    grads = [jax.tree.map(lambda x, i=i: (i + 1) * x[::-1], tree) for i in range(2)]
    zero = jax.tree.map(np.zeros_like, tree)
    momentum = jax.tree.map(lambda a, b: 0.5 * a + b, *grads)
    for kind in ("nsgd", "sign"):
        optimizer = optimizers.of_kind(kind, 0.1, momentum=0.5, clip=jnp.inf)
        (_, last), _ = steps(optimizer, zero, grads)
        (first,), _ = steps(optimizer, zero, grads[:1])
        step = jax.tree.map(lambda a, b: (a - b) / 0.1, first, last)
        if kind == "sign":
            expected = jax.tree.map(np.sign, momentum)
        else:
            layers = [m / np.linalg.norm(m) for m in momentum["layers"]["up"]]
            head = momentum["head"] / np.linalg.norm(momentum["head"])
            expected = {"layers": {"up": np.stack(layers)}, "head": head}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), step, expected
        )


def newton_schulz(x):
    """Five quintic steps, of a matrix that is wider than tall or square."""
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_is_layer_by_layer():
    """Catches a stack taken for one matrix, and an embedding or bias orthogonalised."""
    rng = np.random.default_rng(0)
    tree = {
        "embed": {"embedding": rng.normal(size=(5, 3))},
        "layers": {
            "up": {
                "kernel": rng.normal(size=(2, 2, 4)),
                "bias": rng.normal(size=(2, 4)),
            }
        },
        "final_norm": {"scale": rng.normal(size=(3,))},
    }
    grads = [jax.tree.map(lambda x: rng.normal(size=x.shape), tree) for _ in range(3)]
    optimizer = optimizers.of_kind("muon", 0.1, clip=jnp.inf)
    found, _ = steps(optimizer, tree, grads)
    adam, _ = steps(optimizers.of_kind("adam", 0.1, clip=jnp.inf), tree, grads)
    for path in (("embed", "embedding"), ("layers", "up", "bias"), ("final_norm",)):
        ours, theirs = found[-1], adam[-1]
        for name in path:
            ours, theirs = ours[name], theirs[name]
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    w, m, beta = tree["layers"]["up"]["kernel"], 0.0, 0.95
    for t, g in enumerate(grads, 1):
        g = g["layers"]["up"]["kernel"]
        m = beta * m + (1 - beta) * g
        ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        w = w - 0.1 * np.sqrt(4 / 2) * np.stack([newton_schulz(x) for x in ahead])
        # Newton and Schulz's coefficients are float32 in optax.
        np.testing.assert_allclose(
            found[t - 1]["layers"]["up"]["kernel"], w, rtol=1e-5, atol=1e-6
        )
    values = np.linalg.svd(newton_schulz(ahead[0]), compute_uv=False)
    assert np.all((values > 0.6) & (values < 1.3))


@pytest.mark.parametrize("kind", optimizers.AVERAGING)
def test_schedule_free_is_its_recursion(kind):
    """Defazio et al. 2024: y, z, x. Catches the schedule one step late, a release of y,

    one of x where `averaged` is off, the momentum of Adam left on, an average over steps
    in place of rates, and of 1.2 a correction of v, or none of the average's weights.
    """
    old = kind == "adamw_sf_12"
    start, grads = drawn(count=6)
    schedule = schedules.Schedule(0.5)
    optimizer = optimizers.of_kind(kind, 0.1, schedule, weight_decay=0.2, clip=jnp.inf)
    found, (tabulated, state) = steps(optimizer, start, grads)
    x = y = z = start["kernel"]
    nu = total = top = 0.0
    for t, g in enumerate(grads):
        g = g["kernel"]
        correction = 1 - 0.999 ** (t + 1)
        rate = 0.1 * min(t / 3, 1) * (np.sqrt(correction) if old else 1)
        nu = 0.999 * nu + 0.001 * g**2
        step = g / (np.sqrt(nu if old else nu / correction) + 1e-8) + 0.2 * y
        z = z - rate * step
        top = max(top, rate)
        total += top**2
        share = top**2 / total if total else 0.0
        x = (1 - share) * x + share * z
        y = 0.9 * x + 0.1 * z
        np.testing.assert_allclose(found[t]["kernel"], y, rtol=1e-7)
    released = tabulated.released(found[-1], state)
    np.testing.assert_allclose(released["kernel"], x, rtol=1e-7)
    as_saved = tabulated.replace(averaged=False).released(found[-1], state)
    np.testing.assert_allclose(as_saved["kernel"], y, rtol=1e-7)


def test_a_method_releases_the_average():
    """Catches a release of the weights that gradients are taken at."""
    model, count = toy.Toy(), 3
    hp = sft.Hparams(optimizers.of_kind("adamw_sf", 0.1))
    lineage = types.Lineage(model.init(jax.random.key(0)))
    method = sft.method(model)
    state = loop.init(method, lineage, hp, jax.random.key(1), count)
    data = {"user": jax.tree.map(lambda x: np.stack([x] * count), batch(0))}
    key = jax.random.key(2)
    state, _ = loop.run_chunk(
        method.step, False, state, lineage, data, key, jnp.int32(0)
    )
    z = state.opt_state[1].z
    expected = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, state.params, z)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        method.release(state, lineage).params,
        expected,
    )


@pytest.mark.parametrize("kind", NEW)
def test_bfloat16_and_swept_numbers(kind):
    """Catches float32 in a bfloat16 state, and a number that must be concrete."""
    params = {"layers": {"up": {"kernel": jnp.ones((2, 3, 2), jnp.bfloat16)}}}
    optimizer = optimizers.of_kind(kind, 0.1, weight_decay=0.1).tabulate(2)
    numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), optimizer)

    def step(optimizer, params):
        transform = optimizer.transform()
        state = transform.init(params)
        updates, after = transform.update(params, state, params)
        return state, after, optax.apply_updates(params, updates)

    state, after, moved = jax.eval_shape(step, numbers, params)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after
    )
    assert all(jax.tree.leaves(same))
    assert moved["layers"]["up"]["kernel"].dtype == jnp.bfloat16


def test_kinds_are_named():
    """Catches a KeyError."""
    with pytest.raises(errors.UserError, match="did you mean 'adadelta'"):
        optimizers.of_kind("adaelta", 1.0).tabulate(1).transform()


@pytest.mark.parametrize(
    ("kind", "rate", "reached"),
    [("sgd", 1e-2, 2.0e-5), ("adam", 1e-2, 9.98e-3), ("adam", 2.0, 0.9727)],
)
def test_scale_toy(kind, rate, reached):
    """B.7: theta = phi / 1000 hides from all but a large Adam. Golden values."""
    optimizer = optimizers.Optimizer(rate, clip=jnp.inf, kind=kind).tabulate(1000)
    transform = optimizer.transform()
    gradient = jax.grad(lambda phi: (1e-3 * phi - 1) ** 2)

    def body(carry, _):
        phi, state = carry
        updates, state = transform.update(gradient(phi), state, phi)
        return (phi + updates, state), None

    phi = jnp.float64(0.0)
    (phi, _), _ = jax.lax.scan(body, (phi, transform.init(phi)), length=1000)
    np.testing.assert_allclose(1e-3 * phi, reached, rtol=1e-3)
