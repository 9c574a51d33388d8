"""A step on 8 simulated devices (fsdp x tensor) equals one device's.

One defense of each quantity that spans devices, on the toy: `.ci/run` takes every one to a
Llama, by the same program.
"""

import pathlib

import pytest

from ..conftest import on_eight_devices

PROGRAM = pathlib.Path(__file__).with_name("sharded_step.py")
SPANNING = {
    "booster": "the norm of a gradient",
    "circuit_breakers": "cosines of hidden states",
    "condition_number": "the spectrum of features of all rows",
    "ktipa_code": "a mean over other rows of the batch",
    "repnoise": "distances among rows",
    "resta": "a difference of two models",
    "safegrad": "the angle of two gradients",
    "t_vaccine": "norms of each layer",
    "vaa": "losses of each row",
    "vaccine": "the norm of activations",
}


@pytest.mark.slow
def test_a_sharded_step_equals_that_of_one_device():
    """1e-5 of a step of length 1. Catches a norm or a mean over one device's part of a tree."""
    arguments = [f"{name}:toy" for name in SPANNING]
    assert on_eight_devices(PROGRAM, *arguments).split() == list(SPANNING)
