"""A step of each named defense on 8 simulated devices (fsdp x tensor), and on one.

All of them, on a Llama (`.ci/run`), or some on the toy:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/methods/sharded_step.py
    ... python tests/methods/sharded_step.py vaccine mlac:toy
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from ftdefense.core import registry
from ftdefense.core import tree
from ftdefense.core import types
from ftdefense.methods import schedules
from ftdefense.models import sharding
from ftdefense.models import toy
from ftdefense.models import transformer
from ftdefense.training import loop

TOY = toy.Toy(vocab=24)
LLAMA = transformer.LanguageModel(
    transformer.ModelConfig(
        vocab_size=24,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=32,
        max_length=32,
    )
)
# CLAMP was published for no language model, and takes half a minute to compile for one.
ALWAYS_TOY = ("clamp",)
FEW = {"block_steps": 1, "attack_steps": 2, "defend_steps": 2, "inner_steps": 4}
BATCHLESS = {"leaky", "lox", "safe_lora"}  # They take no step.
# AntiDote writes a patch for each of these: two are compiled in a third of the time.
TARGETS = {"antidote": ("q", "down")}


def weights(model) -> types.Lineage:
    first, second, third = (
        jax.tree.map(lambda x: x.astype(jnp.float64), model.init(jax.random.key(seed)))
        for seed in (1, 0, 2)
    )
    aligned = tree.add_scale(first, 0.1, second)
    return types.Lineage(tree.add_scale(aligned, 0.1, third), aligned, first)


def settings(name: str, model):
    """The sandbox preset, with a step of length 1 at most: Adam would make one of rounding."""
    hp = registry.load("defenses", name).PRESETS["sandbox"].hp
    if hasattr(hp, "optimizer"):
        constant = schedules.Schedule()
        changes = {"kind": "sgd", "schedule": constant, "learning_rate": 1.0}
        hp = hp.replace(optimizer=hp.optimizer.replace(**changes))
    few = {k: min(v, getattr(hp, k)) for k, v in FEW.items() if hasattr(hp, k)}
    if name in TARGETS and model is LLAMA:
        few["targets"] = TARGETS[name]
    return hp.replace(**few)


def batch(key, leading) -> types.Batch:
    shape = (1, *leading, 8, 10)
    tokens = jax.random.randint(key, shape, 1, 24, jnp.int32)
    answer = jnp.arange(10) >= 4
    return types.Batch(np.asarray(tokens), np.broadcast_to(answer, shape) * 1.0)


def compare(name: str, model, lineage: types.Lineage) -> None:
    """Asserts that both end at the same weights, to 1e-5 of a step of length 1."""
    place = sharding.Placement(sharding.mesh(fsdp=4, tensor=2))
    method = registry.method("defenses", name, model)
    hp = settings(name, model)
    roles = method.streams(hp)
    assert bool(roles) != (name in BATCHLESS), f"{name}: BATCHLESS is not up to date"
    if not roles:
        return
    key, *keys = jax.random.split(jax.random.key(2), len(roles) + 1)
    batches = {
        role: batch(k, lead)
        for (role, lead), k in zip(roles.items(), keys, strict=True)
    }
    ends = []
    for put, rows in ((lambda x: x, lambda x: x), (place.parameters, place.batches)):
        origin = put(lineage)
        state = put(loop.init(method, origin, hp, jax.random.key(3), 1))
        end, _ = loop.run_chunk(
            method.step, False, state, origin, rows(batches), key, jnp.int32(0)
        )
        ends.append(method.release(end, origin).params)
    alone, spread = ends
    moved = tree.norm(tree.add_scale(alone, -1.0, lineage.current))
    apart = tree.norm(tree.add_scale(jax.device_get(spread), -1.0, alone))
    assert moved > 0 and apart <= 1e-5, (name, float(apart), float(moved))
    print(name, flush=True)


def main(*names: str) -> None:
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 8, "XLA_FLAGS: see above"
    lineages = {model: weights(model) for model in (LLAMA, TOY)}
    for name in names or registry.names("defenses"):
        name, _, on_the_toy = name.partition(":")
        model = TOY if on_the_toy or name in ALWAYS_TOY else LLAMA
        compare(name, model, lineages[model])


if __name__ == "__main__":
    main(*sys.argv[1:])
