"""What every test runs under: CPU, strict ranks, tiny batches."""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile

# A core each for xdist's workers: XLA's threads would take them from one another.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if hasattr(os, "sched_setaffinity"):
    _CORES = sorted(os.sched_getaffinity(0))
    _MINE = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    if 1 < _WORKERS <= len(_CORES):
        os.sched_setaffinity(0, _CORES[_MINE::_WORKERS])

# Programs here run once on almost nothing: most of a test's time is compilation, which
# XLA's older emitters do in a third of the time, and unsplit modules in a tenth less.
# Child processes inherit all of it.
LIGHT = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{LIGHT} {os.environ.get('XLA_FLAGS', '')}"
# What one worker or command has compiled, the others read: a folder for this session alone.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="ftdefense-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import numpy as np
import pytest

from ftdefense.core import types
from ftdefense.models import toy
from ftdefense.models import transformer

jax.config.update("jax_numpy_rank_promotion", "raise")
# Again, for where a plugin has imported JAX before.
jax.config.update("jax_disable_most_optimizations", True)


def batch(seed: int, rows: int = 4, length: int = 6, vocab: int = 11) -> types.Batch:
    """Random tokens; the first two are the prompt, the last is padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[:, :2] = 0
    weights[:, -1] = 0
    return types.Batch(tokens, weights)


def on_eight_devices(*arguments) -> str:
    """What `python *arguments` prints on eight simulated devices; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": f"{LIGHT} --xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


_FINISHED = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of finished modules would fill gigabytes."""
    yield
    if next(_FINISHED) % 4 == 0:
        jax.clear_caches()


@pytest.fixture
def make_batch():
    return batch


@pytest.fixture(scope="session")
def toy_model():
    return toy.Toy()


@pytest.fixture(scope="session")
def tiny_llama():
    """Two layers, grouped queries; parameters far from their initialisation."""
    model = transformer.LanguageModel(
        transformer.ModelConfig(
            vocab_size=29,
            width=16,
            layers=2,
            heads=4,
            kv_heads=2,
            mlp_width=24,
            max_length=32,
        )
    )
    params = model.init(jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(jax.tree.leaves(params), noise, strict=True)
    ]
    return model, jax.tree.unflatten(jax.tree.structure(params), leaves)


@pytest.fixture
def byte_tokenizer():
    import tokenizers
    import transformers

    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator([], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template=(
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
        ),
    )
