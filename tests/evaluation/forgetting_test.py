"""VAA's profiling: flips are counted along checkpoints, groups are never empty."""

import numpy as np
import pytest

from ftdefense.core import errors
from ftdefense.data import sandbox
from ftdefense.evaluation import forgetting


def test_flips_go_from_safe_to_harmful_only():
    """Catches `bad[:-1] & ~bad[1:]`, and a prompt counted that was never safe."""
    flipped = forgetting.flips([[0], [0, 1], [2], [1, 2]], 4)
    np.testing.assert_array_equal(flipped.sum(0), [0, 2, 1, 0])


def test_split_is_by_flips_and_by_time_where_all_flip():
    """Catches `ever.all()` without `not`, and an order by the last flip."""
    flipped = np.array([[0, 0, 1], [0, 1, 0]], bool)
    np.testing.assert_array_equal(forgetting.split(flipped), [False, True, True])
    flipped = np.array([[0, 1, 0, 1], [1, 0, 1, 1]], bool)
    np.testing.assert_array_equal(forgetting.split(flipped), [False, True, False, True])
    with pytest.raises(errors.UserError, match="no alignment prompt flipped"):
        forgetting.split(np.zeros((3, 2), bool))


def test_the_proxy_is_a_tenth_harmful():
    """Catches a ratio of harmful to benign in place of a share of all."""
    pool = forgetting.proxy(sandbox.build("tiny", 0).defender, 0.1)
    share = np.mean([e.label == "harmful" for e in pool.examples])
    assert abs(share - 0.1) < 0.002
    assert len({e.topic for e in pool.examples if e.label == "harmful"}) == 4
