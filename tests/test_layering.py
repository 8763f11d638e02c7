"""Who may import whom: reads every import statement of the tree and fails on an edge that is not in the table of the style guide."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Every room sees itself. bench/ and tests/ see everything and are seen by nobody.
MAY_IMPORT = {
    "ext": set(),
    "domain": set(),
    "config": {"domain"},
    "store": {"domain"},
    "compose": {"ext", "domain", "config"},
    "journal": {"ext", "domain", "config", "store"},
    "engine": {"ext", "domain", "config", "store", "compose", "journal"},
    "inbound": {"domain", "config", "store", "compose", "journal"},
    "control": {"domain", "config", "store", "compose"},
    "bench": {"ext", "domain", "config", "store", "compose", "journal", "engine", "inbound", "control"},
}

# In .pyx and .pxd files, which `ast` cannot read
CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+(?P<source>[.\w]+)\s+c?import\s+(?P<names>[^#\n]*)|c?import\s+(?P<modules>[\w., \t]+))", re.MULTILINE
)
# Imports that are made from a text: importlib.import_module("engine.app"), __import__("engine")
DYNAMIC_CALLS = {"import_module", "__import__", "find_spec", "run_module"}


def python_imports(text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in Python source, relative ones with their dots."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if name in DYNAMIC_CALLS:
                yield node.lineno, node.args[0].value


def cython_imports(text: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import and cimport in Cython source. Docstrings are prose and may say "from ... import"."""
    without_prose = re.sub(r'"""(?:.|\n)*?"""', lambda found: "\n" * found[0].count("\n"), text)
    for found in CYTHON_IMPORT.finditer(without_prose):
        line = without_prose.count("\n", 0, found.start(0)) + 1 + found[0].count("\n")
        if found["source"]:
            yield line, found["source"]
        else:
            yield from ((line, name.split(" as ")[0].strip()) for name in found["modules"].split(","))


def wrong_edges(root: Path) -> list[str]:
    """Every forbidden import below `root`, as `file:line: room may not import room`."""
    rooms = set(MAY_IMPORT) | {"tests"}
    found = []
    for room, allowed in MAY_IMPORT.items():
        for path in sorted((root / room).rglob("*")):
            if path.suffix not in (".py", ".pyi", ".pyx", ".pxd") or "__pycache__" in path.parts:
                continue
            read = cython_imports if path.suffix in (".pyx", ".pxd") else python_imports
            for line, module in read(path.read_text()):
                place = f"{path.relative_to(root)}:{line}"
                if module.startswith("."):
                    found.append(f"{place}: write the whole name instead of the relative import {module!r}")
                    continue
                other = module.partition(".")[0]
                if other in rooms and other != room and other not in allowed:
                    found.append(f"{place}: {room} may not import {other}")
    return found


def test_every_import_is_in_the_table():
    assert wrong_edges(ROOT) == []


def test_every_room_is_in_the_table():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(MAY_IMPORT)


def test_a_wrong_edge_is_reported_in_every_way_it_can_be_written(tmp_path):
    for name, text in {
        "ext/a.pyx": '"""from engine import prose"""\nfrom libc.string cimport memcpy\ncimport ext.b\nfrom domain cimport reply\n',
        "ext/b.pxd": "cdef int x\nimport json, store.leases\n",
        "domain/a.py": "import os\nimport asyncio, store.postgres as p\n",
        "store/a.py": "def f():\n    from config import load\n",
        "engine/a.py": "from domain import states\nfrom store.leases import grant\nimport importlib\nimportlib.import_module('control')\n",
        "control/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import engine.app\n",
        "journal/a.py": "from . import segments\n",
        "compose/a.py": "import tests.conftest\n",
        "bench/a.py": "import engine.app, control.app\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert sorted(wrong_edges(tmp_path)) == [
        "compose/a.py:1: compose may not import tests",
        "control/a.py:3: control may not import engine",
        "domain/a.py:2: domain may not import store",
        "engine/a.py:4: engine may not import control",
        "ext/a.pyx:4: ext may not import domain",
        "ext/b.pxd:2: ext may not import store",
        "journal/a.py:1: write the whole name instead of the relative import '.'",
        "store/a.py:2: store may not import config",
    ]


def test_init_files_hold_one_docstring_and_nothing_else():
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
            assert is_docstring, f"{path.relative_to(ROOT)} holds more or less than one docstring"
