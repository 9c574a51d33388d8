"""Sharded over eight simulated devices, the decoder computes what it does on one."""

import jax
import optax
import pytest

from ftdefense.core import errors
from ftdefense.methods import adapters
from ftdefense.models import sharding
from ftdefense.models import transformer

from ..conftest import on_eight_devices

MODEL = transformer.LanguageModel(
    transformer.ModelConfig(
        vocab_size=24,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=32,
        attention_bias=True,
        qk_norm=True,
    )
)


def shapes():
    return jax.eval_shape(MODEL.init, jax.random.key(0))


def test_every_parameter_has_names_for_its_axes():
    """Catches swapped (in, out) of o and down: both would be sharded on one side."""
    axes = sharding.logical_axes(shapes())
    layer = axes["layers"]
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    assert axes["lm_head"]["kernel"] == ("embed", "vocab")
    assert axes["final_norm"]["scale"] == (None,)
    assert layer["attention"]["q"]["kernel"] == ("layers", "embed", "heads")
    assert layer["attention"]["o"]["kernel"] == ("layers", "heads", "embed")
    assert layer["attention"]["k"]["bias"] == ("layers", "heads")
    assert layer["attention"]["q_norm"]["scale"] == ("layers", None)
    assert layer["mlp"]["up"]["kernel"] == ("layers", "embed", "mlp")
    assert layer["mlp"]["down"]["kernel"] == ("layers", "mlp", "embed")


def test_factors_and_optimizer_states_follow_their_parameters():
    """Catches states that are replicated: they are two thirds of the memory."""
    lora = jax.eval_shape(
        lambda p: adapters.LoRA(rank=2).init(p, jax.random.key(0)), shapes()
    )
    down = sharding.logical_axes(lora)["layers"]["mlp"]["down"]
    assert down == {"a": ("layers", "mlp", None), "b": ("layers", None, "embed")}
    state = jax.eval_shape(optax.adam(1e-3).init, shapes())
    axes = sharding.logical_axes(state)[0]
    assert axes.mu == sharding.logical_axes(shapes())
    assert axes.count == ()
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((5, *x.shape), x.dtype), shapes()
    )
    up = sharding.logical_axes(stacked)["layers"]["mlp"]["up"]["kernel"]
    assert up == (None, "layers", "embed", "mlp")


def test_too_few_devices_are_named():
    """Catches a mesh that is silently smaller than asked for."""
    with pytest.raises(errors.UserError, match="fsdp=4 .* does not fit on 1 devices"):
        sharding.mesh(fsdp=4, devices=jax.devices()[:1])


PROGRAM = """
import pathlib, tempfile
import jax, jax.numpy as jnp, numpy as np
from ftdefense.attacks import sft
from ftdefense.core import types
from ftdefense.models import sharding, transformer
from ftdefense.objectives import losses
from ftdefense.training import checkpoint, loop, stages

assert len(jax.devices()) == 8
model = transformer.LanguageModel(
    transformer.ModelConfig(
        vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, mlp_width=32
    )
)
params = model.init(jax.random.key(0))
batch = types.Batch(
    jax.random.randint(jax.random.key(1), (8, 6), 0, 24), jnp.ones((8, 6))
)
step = jax.jit(jax.value_and_grad(losses.next_token(model)))
loss, grads = step(params, batch)
for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}):
    mesh = sharding.mesh(**sizes)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    up = placed["layers"]["mlp"]["up"]["kernel"]
    parts = sizes.get("fsdp", 1) * sizes["tensor"]
    assert up.addressable_shards[0].data.size * parts == up.size
    rows = jax.device_put(batch, sharding.batch_sharding(mesh))
    sharded_loss, sharded_grads = step(placed, rows)
    np.testing.assert_allclose(sharded_loss, loss, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), sharded_grads, grads
    )
place = sharding.Placement(sharding.mesh(fsdp=2, tensor=2))
host = jax.tree.map(np.asarray, params)
folder = pathlib.Path(tempfile.mkdtemp()) / "release"
checkpoint.save_params(folder, params)
shapes = place.shapes(jax.eval_shape(model.init, jax.random.key(0)))
read = checkpoint.load_params(folder, shapes)
for found in (stages.given(host, place).params, read):
    up = found["layers"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * 4 == up.size
    jax.tree.map(np.testing.assert_array_equal, found, host)
alone = checkpoint.load_params(folder, jax.eval_shape(model.init, jax.random.key(0)))
checkpoint.save_params(folder, stages.given(host, place).params)
spread = checkpoint.load_params(folder, jax.eval_shape(model.init, jax.random.key(0)))
for found in (alone, spread):
    assert {len(x.devices()) for x in jax.tree.leaves(found)} == {1}
    jax.tree.map(np.testing.assert_array_equal, found, host)
beside = sharding.beside(read, {"rows": np.zeros((4, 3)), "odd": np.zeros((3, 3))})
assert beside["rows"].addressable_shards[0].data.shape == (2, 3)
assert isinstance(beside["odd"], np.ndarray)
method = sft.method(model)
hp = sft.PRESETS["sandbox"].hp
lineage = types.Lineage(stages.given(host, place).params)
state = loop.init(method, lineage, hp, jax.random.key(0), 4, placement=place)
for moment in jax.tree.leaves(state.opt_state):
    if moment.ndim == 3:
        assert moment.addressable_shards[0].data.size * 4 == moment.size
rows = place.batches({"user": jax.tree.map(lambda x: np.asarray(x)[None], batch)})
for first in range(2):
    state, _ = loop.run_chunk(
        method.step, False, state, lineage, rows, jax.random.key(1), jnp.int32(first), place
    )
    assert loop.run_chunk._cache_size() == 1, first
odd = {"mlp": {"up": {"kernel": jnp.zeros((3, 4))}}}
specs = sharding.shardings(odd, sharding.mesh(fsdp=2, tensor=2))
assert tuple(specs["mlp"]["up"]["kernel"].spec) == (None, "tensor")
jax.device_put(odd, specs)
"""


def test_sharded_loss_and_gradient_equal_those_of_one_device():
    """Catches a rule that shards an axis twice, odd axes that are sharded all the
    same, a norm or softmax over a part of its axis, weights of a user's or of a
    finished stage that lie on one device first, moments that lie on all, a second
    program for the second chunk, and a stage that fewer devices cannot read.
    """
    on_eight_devices("-c", PROGRAM)
