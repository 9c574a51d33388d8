"""Every defense's step on 8 simulated devices (fsdp x tensor) equals one device's."""

import os
import pathlib
import subprocess
import sys

import pytest

from ftdefense.core import registry

from ..conftest import LIGHT

PROGRAM = pathlib.Path(__file__).with_name("sharded_step.py")
PARTS = 2
# Derivatives of derivatives take a quarter of the time to compile on the toy.
# `.ci/run` compares these on a Llama, too.
ON_THE_TOY = ("antidote", "clamp", "ktipa_noh", "ktipa_recon", "mlac", "seam", "tar")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_a_sharded_step_equals_that_of_one_device(part):
    """1e-5 of a step of length 1. Catches a norm or a mean over one device's part of a tree."""
    names = registry.names("defenses")[part::PARTS]
    arguments = [f"{n}:toy" if n in ON_THE_TOY else n for n in names]
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
