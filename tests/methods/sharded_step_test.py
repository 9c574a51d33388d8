"""Every defense's step on 8 simulated devices (fsdp x tensor) equals one device's."""

import pathlib

import pytest

from ftdefense.core import registry

from ..conftest import on_eight_devices

PROGRAM = pathlib.Path(__file__).with_name("sharded_step.py")
# The toy's programs compile in less than half the time; `.ci/run` takes all to a Llama.
ON_A_LLAMA = ("booster", "ctrap", "vaccine")
NO_STEP = {"leaky", "lox", "safe_lora"}  # They read no batch.


@pytest.mark.slow
def test_a_sharded_step_equals_that_of_one_device():
    """1e-5 of a step of length 1. Catches a norm or a mean over one device's part of a tree."""
    names = registry.names("defenses")
    arguments = [n if n in ON_A_LLAMA else f"{n}:toy" for n in names]
    compared = on_eight_devices(PROGRAM, *arguments).split()
    assert set(compared) == set(names) - NO_STEP
