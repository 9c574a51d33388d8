"""Scripts as a stranger types them, without the two seconds that each would import."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Imports what others have written, once; forks itself for each command, before JAX has
# started a thread. A child ends as the script does: with its output and its status.
SERVER = """
import gc, json, os, runpy, sys
import datasets, flax.linen, jax, matplotlib.pyplot, optax.contrib, optuna, orbax.checkpoint
import scipy.special, transformers

gc.freeze()  # A child would copy each page that its collector walks.
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate(job["outputs"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = job["arguments"]
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def call(tmp_path_factory):
    """`call(script, *arguments)` as `subprocess.run` answers."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    def run(script, *arguments):
        folder = tmp_path_factory.mktemp("outputs")
        outputs = [folder / name for name in ("stdout", "stderr")]
        line = [str(ROOT / "experiments" / script), *map(str, arguments)]
        job = {"arguments": line, "outputs": [str(path) for path in outputs]}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        texts = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(line, status, *texts)

    with server:
        yield run
        server.stdin.close()
