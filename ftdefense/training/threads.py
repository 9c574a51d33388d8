"""Threads that LAPACK takes on a CPU, where jaxlib calls SciPy's copy of OpenBLAS."""

import contextlib
import functools

import scipy.linalg  # noqa: F401  Loads the library that is to be limited.
import threadpoolctl


def one_for_lapack() -> contextlib.AbstractContextManager:
    """While it is open, a decomposition runs in the thread that asks for it.

    A step decomposes small matrices, one after the other, between what XLA computes on
    all cores: OpenBLAS's own threads take these cores from it (the ratio before and after
    is in BUILD_NOTES.md, "Decisions"). The limit is the whole process's.
    """
    return _libraries().limit(limits=1, user_api="blas")


@functools.cache
def _libraries() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()
