"""LAPACK's threads: one while a chunk runs, as before afterwards."""

import jax
import pytest
import threadpoolctl

from ftdefense.training import loop
from ftdefense.training import threads

from . import training_test as shared

world = shared.world


def allowed() -> set[int]:
    found = threadpoolctl.threadpool_info()
    # Beside PyTorch there is OpenMP, too, which is nobody's business here.
    return {x["num_threads"] for x in found if x["user_api"] == "blas"}


@pytest.fixture
def two():
    """As on a machine of two cores, whatever this one has."""
    with threadpoolctl.threadpool_limits(2, "blas"):
        yield


def test_the_limit_ends_with_its_block(two):
    """Catches a limit that stays: one-off decompositions want all threads."""
    with threads.one_for_lapack():
        assert allowed() == {1}
    assert allowed() == {2}


def test_chunks_run_within_the_limit(two, world, monkeypatch):
    """Catches a chunk that is dispatched outside, or awaited there."""
    seen, run_chunk, fetch = [], loop.run_chunk, jax.device_get
    watch = lambda f: lambda *x: (seen.append(allowed()), f(*x))[1]  # noqa: E731
    monkeypatch.setattr(loop, "run_chunk", watch(run_chunk))
    monkeypatch.setattr(jax, "device_get", watch(fetch))
    shared.train(world)
    assert len(seen) == 2 * len(loop.boundaries(40))
    assert all(found == {1} for found in seen)
