"""Applies the mutants that each defense's tests claim to kill, and requires it of them.

  python tests/mutants.py [--jobs=2] [--most=3] [--passing] [name ...]

The docstring of tests/defenses/NAME_test.py ends with lines such as

    Mutants:
      `old text` -> `new text`
      `old text` -> `new text` in methods/ktipa.py

Each is one change of ftdefense/defenses/NAME.py (or of the file named); `old text` occurs
there exactly once. A mutant is killed if a test fails.
Files are never written: the changed source is loaded in place of the module.
"""

import argparse
import ast
from concurrent import futures
import contextlib
import importlib
import io
import multiprocessing
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINE = re.compile(r"^\s+`(.+?)` -> `(.*?)`(?: in (\S+))?$")
LEAST = 3


def mutants(name: str) -> list[tuple[str, str, str]]:
    """(file, old, new) of each mutant in the docstring of NAME's tests."""
    text = (ROOT / f"tests/defenses/{name}_test.py").read_text()
    doc = ast.get_docstring(ast.parse(text), clean=False) or ""
    _, _, block = doc.partition("Mutants:")
    found = []
    for line in filter(str.strip, block.splitlines()):
        match = LINE.match(line)
        if match is None:
            raise SystemExit(f"{name}_test.py: not a mutant: {line.strip()}")
        old, new, file = match.groups()
        found.append((file or f"defenses/{name}.py", old, new))
    return found


def load(file: str, source: str) -> None:
    """Puts a module made of `source` in the place of ftdefense/FILE."""
    dotted = "ftdefense." + file.removesuffix(".py").replace("/", ".")
    parent, _, leaf = dotted.rpartition(".")
    package = importlib.import_module(parent)
    module = type(sys)(dotted)
    module.__file__ = str(ROOT / "ftdefense" / file)
    module.__package__ = parent
    sys.modules[dotted] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    setattr(package, leaf, module)


def passes(name: str) -> bool:
    """Whether the tests of a defense pass, as the modules now are."""
    import pytest

    from ftdefense.core import registry

    registry.load.cache_clear()
    registry.method.cache_clear()
    sys.modules.pop(f"tests.defenses.{name}_test", None)
    file = str(ROOT / f"tests/defenses/{name}_test.py")
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([file, "-x", "-q", "-p", "no:cacheprovider"])
    if code not in (0, 1):
        raise SystemExit(f"{name}: pytest ended with {code!r}.")
    return code == 0


def check(name: str, most: int, passing: bool) -> list[str]:
    """What is wrong with the first `most` mutants of one defense; empty: all are killed."""
    wrong = []
    found = mutants(name)
    if len(found) < LEAST:
        wrong.append(f"{name}: {len(found)} mutants, {LEAST} are wanted")
    if not passing and not passes(name):
        return [f"{name}: its tests fail without a mutant, so that they prove nothing"]
    for file, old, new in found[:most]:
        path = ROOT / "ftdefense" / file
        source = path.read_text()
        if source.count(old) != 1:
            wrong.append(f"{name}: `{old}` occurs {source.count(old)} times in {file}")
            continue
        dependents = (
            [file]
            if file.startswith("defenses/")
            else [
                file,
                f"defenses/{name}.py",
            ]
        )
        for one in dependents:
            text = (ROOT / "ftdefense" / one).read_text()
            load(one, text.replace(old, new) if one == file else text)
        if passes(name):
            wrong.append(f"{name}: survives: `{old}` -> `{new}` in {file}")
        for one in dependents:
            load(one, (ROOT / "ftdefense" / one).read_text())
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--most", type=int, default=99, help="Mutants of each defense.")
    parser.add_argument(
        "--passing", action="store_true", help="The tests have just passed as they are."
    )
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args()
    tested = sorted(
        path.name.removesuffix("_test.py")
        for path in (ROOT / "tests/defenses").glob("*_test.py")
    )
    names = asked.names or tested
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
        jobs = {
            pool.submit(check, name, asked.most, asked.passing): name for name in names
        }
        wrong, count = [], 0
        for job in futures.as_completed(jobs):
            found = job.result()
            wrong += found
            applied = min(len(mutants(jobs[job])), asked.most)
            count += applied
            print(f"{jobs[job]}: {applied} mutants, {len(found)} alive", flush=True)
    print(f"{count - len(wrong)} of {count} mutants killed")
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
