"""A decoder far from its initialisation, for the tests of its parts."""

import functools

import jax

from ftdefense.methods import adapters
from ftdefense.models import transformer

CONFIG = transformer.ModelConfig(
    vocab_size=23,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=24,
    max_length=16,
    qk_norm=True,
    attention_bias=True,
)
MODEL = transformer.LanguageModel(CONFIG)
SITES = ("attn", "mlp", "resid")


@functools.cache
def params():
    """Random everywhere: also biases and scales, which start at 0 and 1."""
    fresh = MODEL.init(jax.random.key(0))
    leaves, structure = jax.tree.flatten(fresh)
    rngs = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(r, x.shape)
        for x, r in zip(leaves, rngs, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def tokens(batch=2, length=7, seed=2):
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 0, CONFIG.vocab_size
    )


def add_tap(site):
    def intervene(hidden, where, layer, tap):
        return hidden + tap if where == site else hidden

    return intervene


@functools.partial(jax.jit, static_argnames=("model", "intervene"))
def forward(params, tokens, model=MODEL, intervene=None, **arguments):
    return model(params, tokens, intervene=intervene, **arguments)


def factors(b_scale, rank=2):
    """LoRA at all seven kernels."""
    lora = adapters.LoRA(rank=rank, alpha=float(rank)).init(params(), jax.random.key(3))
    leaves, structure = jax.tree.flatten(lora)
    rngs = jax.random.split(jax.random.key(4), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            x + b_scale * jax.random.normal(r, x.shape)
            for x, r in zip(leaves, rngs, strict=True)
        ],
    )
