"""Speed as ratios measured in one run: defense steps over SFT's, and vmap over singles.

  python experiments/bench.py --workdir=runs/bench

Every ratio is the median over rounds in which its two sides ran one after the other,
so that a busy machine slows both. `passes` are the forward-backward passes in specs/.
"""

from collections.abc import Callable
import math
import statistics
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import settings

from ftdefense.core import registry
from ftdefense.core import types
from ftdefense.data import streams
from ftdefense.reporting import rows as result_rows
from ftdefense.reporting import tables
from ftdefense.training import checkpoint
from ftdefense.training import loop

FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)
flags.DEFINE_list("defenses", ["vaccine", "booster", "ctrap"], "Which, or all.")
flags.DEFINE_integer("rounds", 9, "Measurements of each ratio; the median is shown.")
flags.DEFINE_integer("members", 8, "Settings in one vmapped program.")

PASSES = {"vaccine": 2, "booster": 3, "ctrap": 3, "sdd": 1, "none": 1, "never": 1}
STEPS = 12


def stepper(bench, package: str, name: str, members: int = 0) -> Callable[[], None]:
    """A function that runs a warm chunk of STEPS steps and waits for it."""
    method = registry.method(package, name, bench.model)
    plan = bench.plan(package, name)
    pools = bench.world.defender if package == "defenses" else bench.world.attacker
    pools = {**pools, "user": bench.world.attacker["harmful"]}
    budget = (
        bench.defaults.alignment if package == "defenses" else bench.defaults.attack
    )
    batches = {
        role: streams.Stream(pools[role], budget.batch_size, shape, 0).chunk(0, STEPS)
        for role, shape in method.streams(plan.hp).items()
    }
    params = jax.jit(bench.model.init)(jax.random.key(0))
    lineage = types.Lineage(params, params, params)
    hp, rng = plan.hp, jax.random.key(0)
    if members:
        hp = jax.tree.map(lambda x: jnp.full((members,), x), hp)
        rng = jax.random.split(rng, members)
        batches = jax.tree.map(lambda x: np.stack([x] * members), batches)
    mapped = bool(members)
    held = {"state": loop.init(method, lineage, hp, rng, STEPS, mapped=mapped)}

    def run() -> None:
        held["state"], _ = loop.run_chunk(
            method.step, mapped, held["state"], lineage, batches, rng, jnp.int32(0)
        )
        jax.block_until_ready(held["state"])

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


def main() -> None:
    bench = settings.bench()
    bench_rows = []
    sft = stepper(bench, "defenses", "none")
    for name in settings.references("defenses", FLAGS.defenses):
        if not registry.method("defenses", name, bench.model).streams(
            bench.plan("defenses", name).hp
        ):
            continue
        value, taken = ratio(stepper(bench, "defenses", name), sft)
        passes = PASSES.get(name, math.nan)
        bench_rows.append(
            {
                "what": f"{name} step / SFT step",
                "ratio": round(value, 3),
                "target": f"<= {1.1 * passes:.1f}" if passes > 1 else "",
                "ms": round(1000 * taken / STEPS, 2),
            }
        )
    many = stepper(bench, "attacks", "sft", FLAGS.members)
    value, taken = ratio(many, stepper(bench, "attacks", "sft"), FLAGS.members)
    bench_rows.append(
        {
            "what": f"{FLAGS.members} settings in one program / one by one",
            "ratio": round(value, 3),
            "target": "",
            "ms": round(1000 * taken / STEPS, 2),
        }
    )
    header = list(bench_rows[0])
    print(tables.text((header, [[str(r[h]) for h in header] for r in bench_rows])))
    workdir = settings.workdir()
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(workdir / "bench.json", bench_rows)
    result_rows.write_text(workdir / "bench.txt", f"{jax.devices()}\n")


if __name__ == "__main__":
    settings.run(main)
