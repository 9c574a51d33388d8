"""What lies below a direction against PyTorch and transformers, in float64.

Stacked leaves [N, ...] are N parameters there, as they are in a checkpoint.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from ftdefense.core import tree
from ftdefense.methods import freezing
from ftdefense.methods import optimizers
from ftdefense.methods import schedules
from ftdefense.models import huggingface
from ftdefense.models import transformer
from ftdefense.models.huggingface import architectures

STEPS = 12
LEAVES = {
    ("embed", "embedding"): (5, 3),
    ("layers", "attention", "q", "kernel"): (2, 3, 3),
    ("layers", "attention", "q", "bias"): (2, 3),
    ("layers", "attention_norm", "scale"): (2, 3),
    ("layers", "mlp", "up", "a"): (2, 3, 2),
    ("final_norm", "scale"): (3,),
    ("lm_head", "kernel"): (3, 5),
}
DECAYED = ("embedding", "kernel", "a")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def nested(flat):
    params = {}
    for path, leaf in flat.items():
        *folders, name = path
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return params


def flattened(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {tree.path_names(path): np.asarray(leaf) for path, leaf in leaves}


def drawn(rng, scale=1.0):
    return {p: scale * rng.normal(size=shape) for p, shape in LEAVES.items()}


class Theirs:
    """One parameter a layer, in Trainer's two groups, with Trainer's order of calls."""

    def __init__(self, start, make, schedule, warmup, *, clip=1.0, weight_decay=0.1):
        self.clip, self.layers = clip, {}
        for path, leaf in start.items():
            parts = leaf if path[0] == "layers" else leaf[None]
            self.layers[path] = [torch.tensor(x, requires_grad=True) for x in parts]
        groups = [
            {
                "params": [
                    x
                    for path, parts in self.layers.items()
                    for x in parts
                    if (path[-1] in DECAYED) == decays
                ],
                "weight_decay": weight_decay if decays else 0.0,
            }
            for decays in (True, False)
        ]
        self.optimizer = make(groups)
        self.scheduler = transformers.get_scheduler(
            schedule, self.optimizer, num_warmup_steps=warmup, num_training_steps=STEPS
        )

    def step(self, grads, active=None):
        """`active` {path: [N] bools}: the others have no gradient, as if frozen."""
        for path, parts in self.layers.items():
            whole = grads[path] if path[0] == "layers" else grads[path][None]
            for i, x in enumerate(parts):
                trains = active is None or path not in active or active[path][i]
                x.grad = torch.tensor(whole[i]) if trains else None
        every = [x for parts in self.layers.values() for x in parts]
        torch.nn.utils.clip_grad_norm_(every, self.clip)
        self.optimizer.step()
        self.scheduler.step()

    def params(self):
        found = {}
        for path, parts in self.layers.items():
            stacked = np.stack([x.detach().numpy() for x in parts])
            found[path] = stacked if path[0] == "layers" else stacked[0]
        return found


def adamw(groups):
    return torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.999), eps=1e-8)


def run(optimizer, theirs, start, scales, masks=None):
    """The same gradients through both; parameters are compared after every step."""
    rng = np.random.default_rng(1)
    optimizer = optimizer.tabulate(STEPS)
    transform = optax.with_extra_args_support(optimizer.transform())
    params = nested({p: jnp.asarray(x) for p, x in start.items()})
    state = transform.init(params)
    update = jax.jit(transform.update)
    for t in range(STEPS):
        grads = drawn(rng, scales[t % len(scales)])
        theirs.step(grads, None if masks is None else masks[t][0])
        extra = {} if masks is None else {"active": masks[t][1]}
        updates, state = update(nested(grads), state, params, **extra)
        params = optax.apply_updates(params, updates)
        expected = theirs.params()
        for path, leaf in flattened(params).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-9, atol=1e-12)
    return state


def test_everything_decays():
    """torch.optim.AdamW of model.parameters(). Catches norms and biases left out."""
    start = drawn(np.random.default_rng(0))
    theirs = Theirs(start, adamw, "constant", 0)
    for group in theirs.optimizer.param_groups:
        group["weight_decay"] = 0.1
    optimizer = optimizers.Optimizer(0.05, weight_decay=0.1, decay_all=True)
    run(optimizer, theirs, start, scales=(1.0, 0.01))


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_adamw(decay):
    """Gradients longer and shorter than 1. Catches a clip by leaf or after Adam, decay

    of biases and norms or of none, L2 in the place of decay, a schedule one step off.
    """
    start = drawn(np.random.default_rng(0))
    theirs = Theirs(start, adamw, decay, warmup=3)
    # Trainer's `constant` has no warm-up, whatever the ratio says.
    ratio = 0.0 if decay == "constant" else 0.25
    optimizer = optimizers.Optimizer(
        0.05, schedules.Schedule(ratio, decay=decay), weight_decay=0.1
    )
    run(optimizer, theirs, start, scales=(1.0, 0.01, 30.0))


@pytest.mark.parametrize(
    ("decay", "name"),
    [
        ("linear", "linear"),
        ("cosine", "cosine"),
        ("constant", "constant_with_warmup"),
    ],
)
@pytest.mark.parametrize(("steps", "ratio"), [(10, 0.1), (37, 0.1), (30, 0.03)])
def test_schedules(decay, name, steps, ratio):
    """Catches a warm-up rounded down, or from one step's worth; a decay to T - 1."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    # What Trainer's arguments make of a ratio.
    warmup = math.ceil(steps * ratio)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps
    )
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    table = schedules.Schedule(ratio, decay=decay).table(steps)
    np.testing.assert_allclose(table[:steps], found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_what_decays(family):
    """Trainer's groups: every matrix, the embedding too; no bias and no norm.

    Catches a stacked bias or norm scale taken for a matrix.
    """
    shape = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "architectures": [f"{family}ForCausalLM"],
    }
    config = getattr(transformers, f"{family}Config")(**shape)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    decaying = transformers.Trainer.get_decay_parameter_names(None, theirs)
    ours = transformer.LanguageModel(architectures.parse(config.to_dict(), "here"))
    params = jax.eval_shape(ours.init, jax.random.key(0))
    decays = {
        tree.path_names(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            optimizers.matrices(params)
        )
    }
    names = {name for name, _ in theirs.named_parameters()}
    seen = set()
    for tensor in huggingface.tensors(ours):
        assert decays[tensor.path] == (tensor.name in decaying), tensor.name
        seen.add(tensor.name)
    assert seen == names


def masks(seed):
    """A draw of layers for each step; the attention of the others is frozen."""
    rng = np.random.default_rng(seed)
    params = nested({path: np.zeros(shape) for path, shape in LEAVES.items()})
    found = []
    for t in range(STEPS):
        # Both, one, the other, none: every case, and one that trains late.
        on = np.array([t >= 4 and rng.random() < 0.6, rng.random() < 0.5])
        theirs = {path: on for path in LEAVES if "attention" in path}
        ours = freezing.by_layer(params, jnp.asarray(on), "attention")
        found.append((theirs, ours))
    return found


def test_adamw_by_leaf():
    """Catches one count for all, decay or momentum of a frozen layer, and a norm that

    includes the gradients of what is frozen.
    """
    start = drawn(np.random.default_rng(0))
    theirs = Theirs(start, adamw, "cosine", warmup=2)
    optimizer = optimizers.Optimizer(
        0.05,
        schedules.Schedule(2 / STEPS, decay="cosine"),
        weight_decay=0.1,
        kind="adamw_by_leaf",
    )
    drawn_masks = masks(3)
    on = np.stack(
        [theirs[("layers", "attention", "q", "kernel")] for theirs, _ in drawn_masks]
    )
    assert {tuple(x) for x in on.tolist()} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    state = run(optimizer, theirs, start, (1.0, 0.01, 30.0), drawn_masks)
    counts = next(s.count for s in state if isinstance(s, freezing.AdamByLeaf))
    kernel = counts["layers"]["attention"]["q"]["kernel"].ravel()
    np.testing.assert_array_equal(kernel, on.sum(0))
    np.testing.assert_array_equal(counts["lm_head"]["kernel"].ravel(), [STEPS])
    for path, parts in theirs.layers.items():
        if path == ("layers", "attention", "q", "kernel"):
            steps = [int(theirs.optimizer.state[x]["step"]) for x in parts]
            np.testing.assert_array_equal(kernel, steps)


def test_by_leaf_with_all_active_is_adamw():
    """Catches a mask that is missing, and a bias correction of its own."""
    start = drawn(np.random.default_rng(0))
    theirs = Theirs(start, adamw, "linear", warmup=0)
    optimizer = optimizers.Optimizer(
        0.05,
        schedules.Schedule(decay="linear"),
        weight_decay=0.1,
        kind="adamw_by_leaf",
    )
    run(optimizer, theirs, start, scales=(1.0, 0.01))


def test_sgd():
    """Heavy ball, without dampening. Catches a mean of gradients, and Nesterov's."""
    start = drawn(np.random.default_rng(0))

    def sgd(groups):
        return torch.optim.SGD(groups, lr=0.05, momentum=0.7)

    theirs = Theirs(start, sgd, "constant", 0, clip=2.0, weight_decay=0.0)
    optimizer = optimizers.Optimizer(0.05, clip=2.0, momentum=0.7, kind="sgd")
    run(optimizer, theirs, start, scales=(1.0, 0.01))


def test_an_infinite_clip_is_none():
    """Catches 0 * infinity at a long gradient."""
    start = drawn(np.random.default_rng(0))
    theirs = Theirs(start, adamw, "constant", 0, clip=float("inf"))
    optimizer = optimizers.Optimizer(0.05, clip=float("inf"), weight_decay=0.1)
    run(optimizer, theirs, start, scales=(1e3, 1e-3))
