"""The dependency rule: a folder imports only itself and folders above it."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1] / "ftdefense"
ORDER = (
    "core data models objectives methods attacks defenses training evaluation audit "
    "reporting"
).split()


def _imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "ftdefense."
        ):
            found.add(node.module.split(".")[1])
    return found


def test_imports_go_one_way():
    """Catches `from ftdefense.training import x` written in a folder before it."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {folder}"
        for path in ROOT.glob("*/**/*.py")
        for folder in _imports(path)
        if ORDER.index(folder) > ORDER.index(path.relative_to(ROOT).parts[0])
    ]
    assert not wrong


def test_reporting_knows_no_jax():
    """Catches an `import jax` in reporting, which must read rows anywhere."""
    assert not [
        path.name
        for path in (ROOT / "reporting").glob("*.py")
        if "import jax" in path.read_text()
    ]


def test_no_folder_of_odds_and_ends():
    """Catches a module called utils: a folder that needs one lacks a concept."""
    banned = {"utils", "helpers", "common", "base", "misc"}
    assert not [p for p in ROOT.glob("**/*.py") if p.stem in banned]
