"""Every defense's step on 8 simulated devices (fsdp x tensor) equals one device's."""

import os
import pathlib
import subprocess
import sys

import pytest

from ftdefense.core import registry

from ..conftest import LIGHT

PROGRAM = pathlib.Path(__file__).with_name("sharded_step.py")
# The toy's programs compile in a quarter of the time; `.ci/run` takes all to a Llama.
ON_A_LLAMA = ("booster", "ctrap", "vaccine")


@pytest.mark.slow
def test_a_sharded_step_equals_that_of_one_device():
    """1e-5 of a step of length 1. Catches a norm or a mean over one device's part of a tree."""
    names = registry.names("defenses")
    arguments = [n if n in ON_A_LLAMA else f"{n}:toy" for n in names]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{LIGHT} --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    # Lox, none and what else has no stream of batches takes no step.
    assert len(done.stdout.split()) >= len(names) - 3
