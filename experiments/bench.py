"""Speed as ratios measured in one run: defense steps over SFT's, and vmap over singles.

  python experiments/bench.py --workdir=runs/bench

Every ratio is the median over rounds in which its two sides ran one after the other,
so that a busy machine slows both, on batches of the size that the defense takes. The
target is 1.1 x the forward-backward passes that a method's docstring counts, a backward
counting as two forwards.
"""

from collections.abc import Callable
import json
import statistics
import subprocess
import sys
import time

from absl import flags
import choices
import jax
import jax.numpy as jnp
import numpy as np
import settings
import workers

from ftdefense.core import config
from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import recipes
from ftdefense.data import streams
from ftdefense.methods import costs
from ftdefense.reporting import tables
from ftdefense.training import checkpoint
from ftdefense.training import loop
from ftdefense.training import threads
from ftdefense.training import together

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.adopt_module_key_flags(workers)
flags.DEFINE_list("defenses", ["vaccine", "booster", "ctrap"], "Which, or all.")
flags.DEFINE_integer("rounds", 9, "Measurements of each ratio; the median is shown.")
flags.DEFINE_integer("members", 8, "Settings in one vmapped program.")
flags.DEFINE_integer("trials", 16, "Whole attacks in one program; 0: not measured.")
flags.DEFINE_bool("paced", False, "Set for processes that run a chunk for each line.")

STEPS = 12  # Of a cheap method; fewer of one with a long inner loop.
INNER_LOOPS = ("inner_steps", "attack_steps", "block_steps")


def stepper(
    bench,
    package: str,
    name: str,
    members: int = 0,
    steps: int = STEPS,
    rows: int = 0,
) -> Callable[[], dict[str, float]]:
    """A function that runs a warm chunk of `steps` steps and tells its mean metrics.

    Batches have `rows` rows; at 0 as many as the alignment's, or an attack's.
    """
    method = registry.method(package, name, bench.model)
    plan = bench.plan(package, name)
    pools = bench.world.defender if package == "defenses" else bench.world.attacker
    user = bench.world.attacker["harmful"]
    groups = dict.fromkeys(("vulnerable", "steady"), bench.world.defender["alignment"])
    pools = {**groups, **pools, "user": user}
    pools["user_refusal"] = recipes.refused(bench.world, user, 0)
    budget = (
        bench.defaults.alignment if package == "defenses" else bench.defaults.attack
    )
    batches = {
        role: streams.Stream(pools[role], rows or budget.batch_size, shape, 0).chunk(
            0, steps
        )
        for role, shape in method.streams(plan.hp).items()
    }
    params = bench.model.init(jax.random.key(0))
    lineage = types.Lineage(params, params, params)
    hp, rng = plan.hp, jax.random.key(0)
    if members:
        hp = jax.tree.map(lambda x: jnp.full((members,), x), hp)
        rng = jax.random.split(rng, members)
        batches = jax.tree.map(lambda x: np.stack([x] * members), batches)
    mapped = bool(members)
    held = {"state": loop.init(method, lineage, hp, rng, steps, mapped=mapped)}

    def run() -> dict[str, float]:
        with threads.one_for_lapack():
            held["state"], metrics = loop.run_chunk(
                method.step, mapped, held["state"], lineage, batches, rng, jnp.int32(0)
            )
            jax.block_until_ready(held["state"])
        return {name: float(np.mean(value)) for name, value in metrics.items()}

    run()
    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(above: Callable[[], None], below: Callable[[], None], times: int = 1):
    """(median ratio, median seconds of `above`); `below` runs `times` times."""
    taken = []
    for _ in range(FLAGS.rounds):
        b = sum(seconds(below) for _ in range(times))
        taken.append((seconds(above), b))
    ratios = [a / b for a, b in taken]
    return statistics.median(ratios), statistics.median(a for a, _ in taken)


def trials(bench) -> list[dict]:
    """Whole attacks in one program against one by one, from the same release.

    A run of its own compiles anew, as sixteen commands do; `compiled once` is what is
    left if one process runs them all.
    """
    (release,) = bench.aligned((0,))
    plan = bench.plan("attacks", "sft")
    rates = np.geomspace(1e-5, 1e-3, FLAGS.trials)
    jobs = [
        bench.attack_job(
            "sft",
            config.override_plan(plan, f"optimizer.learning_rate={rate}"),
            release,
            0,
        )
        for rate in rates
    ]

    def single(anew: bool) -> list:
        outcomes = []
        for job in jobs:
            if anew:
                jax.clear_caches()
            outcomes += together.sweep([job])
        return outcomes

    ends: dict[str, list] = {}
    taken: dict[str, list[float]] = {}
    for _ in range(min(FLAGS.rounds, 3)):
        jax.clear_caches()
        for name, run in (
            ("together", lambda: together.sweep(jobs)),
            ("compiled once", lambda: single(False)),
            ("compiled each", lambda: single(True)),
        ):
            started = time.perf_counter()
            ends[name] = run()
            jax.block_until_ready(ends[name][-1].params)
            taken.setdefault(name, []).append(time.perf_counter() - started)
    apart = max(
        float(jnp.max(jnp.abs(a - b)))
        for one, other in zip(ends["together"], ends["compiled each"], strict=True)
        for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True)
    )
    found = []
    for name in ("compiled each", "compiled once"):
        ratios = [a / b for a, b in zip(taken["together"], taken[name], strict=True)]
        value = statistics.median(ratios)
        target = 0.5 if name == "compiled each" else None
        found.append(
            {
                "what": f"{FLAGS.trials} trials in one program / {FLAGS.trials} runs, "
                f"{name}; weights differ by {apart:.1g}",
                "ratio": round(value, 3),
                "target": f"<= {target}" if target else "",
                "met": "" if target is None else "yes" if value <= target else "NO",
                "ms": round(1000 * statistics.median(taken["together"]), 1),
            }
        )
    return found


def paced(bench) -> None:
    """Runs a chunk for each line that comes in, and answers it."""
    run = stepper(bench, "defenses", "none")
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        print("done", flush=True)


def side_by_side(bench) -> dict | None:
    """One process a core against one on all of them: the time of as many SFT steps."""
    number = workers.count(sys.maxsize)
    if number < 2:
        return None
    command = [sys.executable, *sys.argv, "--paced"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    crew = [workers.start(command, i, number, **pipes) for i in range(number)]

    def together() -> None:
        for process in crew:
            print(file=process.stdin, flush=True)
        for process in crew:
            process.stdout.readline()

    for process in crew:
        process.stdout.readline()
    value, taken = ratio(together, stepper(bench, "defenses", "none"), number)
    for process in crew:
        process.communicate()
    return {
        "what": f"SFT steps: {number} processes, a core each / one process on all cores",
        "ratio": round(value, 2),
        "target": "",
        "met": "",
        "ms": round(1000 * taken / (STEPS * number), 1),
    }


def main() -> None:
    bench = settings.bench()
    if FLAGS.paced:
        paced(bench)
        return
    bench_rows = []
    below: dict[tuple[int, int], Callable[[], None]] = {}
    shapes = jax.eval_shape(bench.model.init, jax.random.key(0))
    readouts = costs.of_all_states(shapes)
    for name in choices.references("defenses", FLAGS.defenses):
        plan = bench.plan("defenses", name)
        hp, rows = plan.hp, plan.batch_size
        if not registry.method("defenses", name, bench.model).streams(hp):
            continue  # An edit: no step.
        turns = max(getattr(hp, loop, 0) for loop in INNER_LOOPS)
        steps = STEPS if turns < 4 else 2
        run = stepper(bench, "defenses", name, steps=steps, rows=rows)
        # Which of VAA's steps ascend is drawn: counted as they were.
        ascents = run().get("share/ascent")
        passes = costs.passes(
            *costs.of_step(name, hp, bench.world.length, readouts, ascents)
        )
        if (steps, rows) not in below:
            below[steps, rows] = stepper(
                bench, "defenses", "none", steps=steps, rows=rows
            )
        value, taken = ratio(run, below[steps, rows])
        bound = 2.0 if name in ("vaccine", "t_vaccine") else 1.1 * passes
        bench_rows.append(
            {
                "what": f"{name} step / SFT step",
                "ratio": round(value, 2),
                "target": f"<= {bound:.2f}",
                "met": "yes" if value <= bound else "NO",
                "ms": round(1000 * taken / steps, 1),
            }
        )
        print(json.dumps(bench_rows[-1]), file=sys.stderr, flush=True)
    many = stepper(bench, "attacks", "sft", FLAGS.members)
    value, taken = ratio(many, stepper(bench, "attacks", "sft"), FLAGS.members)
    bench_rows.append(
        {
            "what": f"{FLAGS.members} settings in one program / one by one",
            "ratio": round(value, 3),
            "target": "",
            "met": "",
            "ms": round(1000 * taken / STEPS, 2),
        }
    )
    shared = side_by_side(bench)
    bench_rows += [shared] if shared else []
    if FLAGS.trials:
        bench_rows += trials(bench)
    header = list(bench_rows[0])
    print(tables.text((header, [[str(r[h]) for h in header] for r in bench_rows])))
    workdir = settings.workdir()
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(workdir / "bench.json", bench_rows)


if __name__ == "__main__":
    settings.run(main)
