"""Whether a sweep of the learning rate stopped at an edge: O1."""

from collections.abc import Sequence
import math


def edge(
    rates: Sequence[float], scores: Sequence[float], *, tie: float, enough: float
) -> str:
    """`high`, `low` or nothing: the end of a sweep at which the best may lie beyond.

    A low end must be best alone. A high end may share its place, as rates too small to
    do anything do, unless the score is `enough` there. NaN is a run that diverged.
    """
    scores = [-math.inf if math.isnan(s) else s for s in scores]
    ordered = [s for _, s in sorted(zip(rates, scores, strict=True))]
    best = max(ordered)
    if math.isinf(best):
        return "low"
    near = [s >= best - tie for s in ordered]
    if near[-1] and not (best >= enough and any(near[:-1])):
        return "high"
    return "low" if near[0] and not any(near[1:]) else ""
