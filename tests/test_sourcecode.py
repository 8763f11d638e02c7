"""The source itself: style, types, stubs, and that what the documents name exists. `make check` runs this file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("bench", "compose", "config", "control", "domain", "engine", "ext", "inbound", "journal", "store", "tests")
DOCUMENTS = ["README.md", "CHANGELOG.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# `store/leases.py`, `config/sluice.example.toml`, `docs/decisions/0001-x.md` in backticks or as the target of a link
NAMED_PATH = re.compile(r"(?:`|\]\()([A-Za-z0-9_.][A-Za-z0-9_./-]*\.(?:py|pyx|pxd|pyi|md|toml|sql|lock|csv|html|txt|yml))(?:`|\)|#)")
# Made while running, or named as an example of what the reader brings
MADE_BY_READERS = re.compile(r"^(?:acct|recipients|newsletter|sluice\.toml|state/|list|people|contacts|subscribers|rejected|refused)")


def run(*command: str, timeout_seconds: float = 600) -> None:
    """Run a tool of the environment; its output is the failure."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout_seconds, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command[:2])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing():
    run("ruff", "check", "--quiet", "--output-format=concise", ".")


def test_mypy_strict_finds_nothing():
    run("mypy", "--strict", *[room for room in ROOMS if (ROOT / room).is_dir()])


@pytest.mark.parametrize("room", ["ext", "bench"])
def test_stubs_are_true_to_the_compiled_modules(room):
    # A cdef class is a "disjoint base" to the interpreter; saying so in every stub would help nobody
    options = ["--ignore-disjoint-bases", "--ignore-unused-allowlist", "--allowlist", "tests/stubtest-allowed.txt", "--concise"]
    run("mypy.stubtest", *options, *[f"{room}.{path.stem}" for path in sorted((ROOT / room).glob("*.pyx"))])


@pytest.mark.parametrize("room", ["ext", "bench"])
def test_every_compiled_module_has_a_stub(room):
    missing = [path.name for path in (ROOT / room).glob("*.pyx") if not path.with_suffix(".pyi").exists()]
    assert missing == []


def test_every_file_says_at_its_top_what_it_owns():
    without = []
    for room in ROOMS:
        without += [
            path for path in (ROOT / room).rglob("*.py") if path.stat().st_size and ast.get_docstring(ast.parse(path.read_text())) is None
        ]
        # Directives for the compiler come before the docstring
        without += [path for path in (ROOT / room).glob("*.pyx") if not re.match(r'(#[^\n]*\n|\s)*"""', path.read_text())]
    assert [str(path.relative_to(ROOT)) for path in without] == []


def test_nothing_is_left_for_later():
    marks = re.compile(r"\b(?:TODO|FIXME|HACK)\b")
    found = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py*"):
            if path.suffix in (".py", ".pyx", ".pxd", ".pyi") and path != Path(__file__):
                found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(path.read_text().splitlines(), 1) if marks.search(line)]
    assert found == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_that_a_document_names_exist(document):
    path = ROOT / document
    if not path.exists():
        pytest.skip(f"{document} is not part of this tree")
    missing = []
    for named in NAMED_PATH.findall(path.read_text()):
        places = [ROOT / named, path.parent / named, *(ROOT / room / named for room in ROOMS)]
        if not MADE_BY_READERS.match(named) and not any(place.exists() for place in places):
            missing.append(named)
    assert missing == []
