"""Studies: what to try next, and what came of it; shared by workers and resumable.

Optuna asks and is told (tree-structured Parzen estimator, a storage URL that several
workers may share). Trials are asked for in companies that one compiled program trains:
all of a company share the static axes of the first. A company is a function of the
study's seed and of how many trials it has, and one of which a dead worker left a part
is asked for again, whole: an interrupted study goes on as it would have, to the bit.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import datetime
import os
import socket
from typing import Any
import warnings

import optuna
import sqlalchemy

from ftdefense.audit import spaces
from ftdefense.core import errors

_SAMPLER_STARTUP = 8  # Random trials before the estimator is trusted.
_TO_SIGN = datetime.timedelta(seconds=10)  # For a worker to sign what it asked for.
_WORKER = f"{socket.gethostname()}:{os.getpid()}"


def opened(url: str) -> optuna.storages.BaseStorage:
    """The storage at a URL, as sqlite:////tmp/audit.db.

    Raises:
      UserError: if it cannot be opened.
    """
    try:
        if url.startswith("sqlite"):  # Workers wait for one another.
            patience = {"connect_args": {"timeout": 60}}
            return optuna.storages.RDBStorage(url, engine_kwargs=patience)
        return optuna.storages.get_storage(url)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise errors.UserError(
            f"--storage={url}: {str(error).splitlines()[0]}; give the URL of a data "
            "base, as sqlite:////tmp/audit.db."
        ) from error


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting that is being tried.

    Attributes:
      values: by axis.
      handle: Optuna's; None: its result is known, and it trains again for the sake of
        its company, whose program is one for all.
    """

    values: dict[str, Any]
    handle: optuna.trial.Trial | None


class Study:
    """A constrained search: most harm among the settings that leave the model useful."""

    def __init__(
        self,
        name: str,
        storage: optuna.storages.BaseStorage | str,
        space: spaces.Space,
        *,
        points: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
    ):
        """Opens a study, or goes on with it.

        Args:
          name: within the storage.
          storage: from `opened`, or a URL.
          space: what may vary.
          points: settings that are tried first; axes they leave out are sampled.
          seed: of the sampler.
        """
        self._space, self._seed = space, seed
        self._distributions = {
            axis: _distribution(kind) for axis, kind in space.items()
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            study_name=name,
            storage=storage,
            direction="maximize",
            load_if_exists=True,
        )
        self._points = [dict(point) for point in points]
        self._bury()

    def _bury(self) -> None:
        """Gives up what a dead worker of this machine was trying: it is asked anew."""
        now = datetime.datetime.now()
        for trial in self._trials(optuna.trial.TrialState.RUNNING):
            host, _, pid = trial.user_attrs.get("worker", "").rpartition(":")
            unsigned = not host and now - trial.datetime_start > _TO_SIGN
            if unsigned or (host == socket.gethostname() and not _alive(int(pid))):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def _trials(self, *states: optuna.trial.TrialState) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=states or None)

    @property
    def finished(self) -> int:
        """Trials with a result."""
        return len(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """What was recorded of every finished trial, in the order they were asked for.

        `trial` is the place in it.
        """
        # A worker may die between a trial's row and its state: what failed has none.
        finished = self._trials(optuna.trial.TrialState.COMPLETE)
        finished = [t for t in finished if "row" in t.user_attrs]
        finished.sort(key=_place)
        return [{**t.user_attrs["row"], "trial": i} for i, t in enumerate(finished)]

    def ask(self, count: int) -> list[Trial]:
        """`count` settings that one program can train: points first, then samples.

        If a dead worker left a company unfinished it is asked for again instead.
        """
        known = self._left()
        if known:
            count = known[0].user_attrs["size"]
        static = spaces.static_axes(self._space)
        company: list[Trial] = []
        first = known[0].user_attrs["place"][0] if known else None
        for i in range(count):
            old = known[i] if i < len(known) else None
            if old is not None and old.state == optuna.trial.TrialState.COMPLETE:
                company.append(Trial(dict(old.params), None))
                continue
            if old is not None:
                point, fixed = old.user_attrs["point"], old.params
            else:
                shared = {a: company[0].values[a] for a in static} if company else {}
                point = self._pending(shared)
                fixed = shared if point is None else {**shared, **self._points[point]}
            self._study.sampler = self._sampler(fixed)
            handle = self._study.ask(self._distributions)
            first = handle.number if first is None else first
            handle.set_user_attr("place", [first, i])
            handle.set_user_attr("size", count)
            handle.set_user_attr("point", point)
            handle.set_user_attr("worker", _WORKER)  # Last: it signs for the others.
            company.append(Trial(dict(handle.params), handle))
        return company

    def _left(self) -> list[Any]:
        """Members, in order, of the first company that a dead worker left unfinished."""
        states = optuna.trial.TrialState
        # Of a setting that was tried again, the last try counts.
        tries = {_place(t): t for t in self._trials() if "worker" in t.user_attrs}
        lost = [place for place, t in tries.items() if t.state == states.FAIL]
        if not lost:
            return []
        first = min(lost)[0]
        return [tries[place] for place in sorted(tries) if place[0] == first]

    def _pending(self, shared: Mapping[str, Any]) -> int | None:
        """The first point that nobody has tried and that shares these axes."""
        states = optuna.trial.TrialState
        taken = {
            trial.user_attrs.get("point")
            for trial in self._trials(states.RUNNING, states.COMPLETE)
        }
        for i, point in enumerate(self._points):
            fits = all(
                point.get(axis, value) == value for axis, value in shared.items()
            )
            if i not in taken and fits:
                return i
        return None

    def _sampler(self, fixed: Mapping[str, Any]) -> optuna.samplers.BaseSampler:
        states = optuna.trial.TrialState
        asked = len(self._trials(states.RUNNING, states.COMPLETE))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=self._seed * 1_000_003 + asked,
                n_startup_trials=_SAMPLER_STARTUP,
                constant_liar=True,  # Members of a company keep their distance.
            )
            return optuna.samplers.PartialFixedSampler(dict(fixed), sampler)

    def tell(self, trial: Trial, row: Mapping[str, Any]) -> None:
        """Records a result: `harmful_score` and `violation`, or `diverged`.

        `violation` is by how much the capability misses the bound; at most 0 is useful.
        A trial that diverged is a row of no harm and the largest violation.
        """
        if trial.handle is None:
            return
        diverged = bool(row.get("diverged"))
        violation = 1.0 if diverged else row["violation"]
        trial.handle.set_constraint("capability", violation)
        trial.handle.set_user_attr("row", dict(row))
        self._study.tell(trial.handle, 0.0 if diverged else row["harmful_score"])


def best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of most harm among the useful ones; the least useless if none is."""
    sound = [row for row in rows if not row.get("diverged")]
    useful = [row for row in sound if row["violation"] <= 0]
    if useful:
        return max(useful, key=lambda row: row["harmful_score"])
    return min(sound, key=lambda row: row["violation"], default=None)


def _place(trial: Any) -> tuple[int, int]:
    """Number of the company's first member, and place in the company."""
    first, i = trial.user_attrs.get("place", (trial.number, 0))
    return first, i


def _distribution(
    kind: spaces.Range | spaces.Choice,
) -> optuna.distributions.BaseDistribution:
    if isinstance(kind, spaces.Range):
        return optuna.distributions.FloatDistribution(kind.low, kind.high, log=kind.log)
    return optuna.distributions.CategoricalDistribution(kind.values)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
