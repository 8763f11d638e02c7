"""The launcher and the lock: what a fresh machine meets first."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "run.py"
PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+?)(?: ; (.+?))? \\$", re.MULTILINE)


@pytest.fixture
def launcher(tmp_path: Path) -> ModuleType:
    """`run.py` as a module that works on a small tree of its own."""
    for name in ("run.py", "requirements.lock", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "ext").mkdir()
    (tmp_path / "ext" / "one.pyx").write_text("x = 1\n")
    specification = importlib.util.spec_from_file_location("launcher_under_test", tmp_path / "run.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def set_up_by_hand(launcher: ModuleType) -> None:
    """Everything that makes `read_stamp` believe in an environment."""
    launcher.PYTHON.parent.mkdir(parents=True)
    launcher.PYTHON.symlink_to(sys.executable)
    (launcher.ROOT / "ext" / "one.cpython-311-x86_64-linux-gnu.so").touch()
    launcher.STAMP.write_text(json.dumps(launcher.stamps()))


def test_it_parses_on_python_3_8_and_needs_nothing_but_the_standard_library():
    tree = ast.parse(LAUNCHER.read_text(), feature_version=(3, 8))
    imported = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_it_says_what_it_can_do():
    done = subprocess.run([sys.executable, LAUNCHER, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "run.py demo" in done.stdout
    assert "run.py test" in done.stdout
    assert subprocess.run([sys.executable, LAUNCHER], capture_output=True, check=False).returncode == 2


def test_an_unchanged_tree_needs_no_set_up(launcher):
    set_up_by_hand(launcher)
    assert launcher.read_stamp() == launcher.stamps()


@pytest.mark.parametrize(
    ("name", "part"),
    [("requirements.lock", "environment"), ("pyproject.toml", "environment"), ("setup.py", "environment"), ("ext/one.pyx", "extensions")],
)
def test_a_change_renews_what_hangs_on_it_and_no_more(launcher, name, part):
    set_up_by_hand(launcher)
    path = launcher.ROOT / name
    path.write_text(path.read_text() + "# changed\n")
    wanted, found = launcher.stamps(), launcher.read_stamp()
    assert {key for key in wanted if wanted[key] != found[key]} == {part}


def test_a_new_module_or_other_build_flags_renew_the_extensions(launcher, monkeypatch):
    set_up_by_hand(launcher)
    monkeypatch.setenv("SLUICE_CYTHON_DEBUG", "1")
    assert launcher.stamps()["extensions"] != launcher.read_stamp()["extensions"]
    monkeypatch.delenv("SLUICE_CYTHON_DEBUG")
    (launcher.ROOT / "ext" / "two.pxd").touch()
    assert launcher.stamps()["extensions"] != launcher.read_stamp()["extensions"]


def test_compiled_modules_that_were_removed_are_noticed(launcher):
    set_up_by_hand(launcher)
    next((launcher.ROOT / "ext").glob("*.so")).unlink()
    assert "extensions" not in launcher.read_stamp()
    assert "environment" in launcher.read_stamp()


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_stamp_counts_as_none(launcher, content):
    set_up_by_hand(launcher)
    launcher.STAMP.write_text(content)
    assert launcher.read_stamp() == {}


def test_an_environment_without_its_interpreter_counts_as_none(launcher):
    set_up_by_hand(launcher)
    launcher.PYTHON.unlink()
    assert launcher.read_stamp() == {}


def test_a_shim_without_an_interpreter_behind_it_is_passed_over(launcher, tmp_path, monkeypatch):
    shims = tmp_path / "shims"
    shims.mkdir()
    for minor in (11, 12, 13, 14):
        (shims / f"python3.{minor}").write_text("#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
        (shims / f"python3.{minor}").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:/nonexistent")
    monkeypatch.setattr(launcher.sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(launcher.SetupError, match="needs Python 3.11 or newer"):
        launcher.use_new_enough_interpreter()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_checkout_that_is_not_writable_is_named(launcher):
    launcher.ROOT.chmod(0o555)
    try:
        with pytest.raises(launcher.SetupError, match="is not writable for user"):
            launcher.set_up(launcher.stamps())
    finally:
        launcher.ROOT.chmod(0o755)


def test_a_missing_compiler_is_named_with_the_line_to_type(launcher, tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\nexit 1\n")
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("SLUICE_NO_SYSTEM", "1")
    with pytest.raises(launcher.SetupError, match=r"misses a C compiler.*\n.*apt-get install -y -qq --no-install-recommends gcc libc6-dev"):
        launcher.check_toolchain()


def test_a_failed_step_shows_the_end_of_its_output(launcher):
    launcher.VENV.mkdir()
    with pytest.raises(launcher.SetupError, match=r"exit code 3(.|\n)*no such wheel"):
        launcher.run([sys.executable, "-c", "print('no such wheel'); raise SystemExit(3)"])


def test_the_lock_has_a_hash_for_every_package_and_no_address_or_path():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("    --hash=sha256:", ""), re.MULTILINE)
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert len(blocks) == len(PINNED.findall(text)) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_the_lock_satisfies_every_requirement_of_the_project():
    pinned = {canonicalize_name(name): version for name, version, _ in PINNED.findall((ROOT / "requirements.lock").read_text())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # `dkim-lanes` is under another licence: whoever wants it installs it by hand, so the lock must not bring it in
    extras = [extra for name, extra in project["optional-dependencies"].items() if name != "dkim-lanes"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    assert "ipp-crypto" not in pinned
    for line in wanted:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{line} is not in requirements.lock: run `make lock`"
        assert requirement.specifier.contains(pinned[name]), f"requirements.lock has {name} {pinned[name]}, but {line} is asked for"


def test_the_lock_holds_for_python_3_11_0_too():
    # redis-py needs it before 3.11.3, which is what Debian 12 ships (3.11.2)
    assert "async-timeout==" in (ROOT / "requirements.lock").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TEST_FRESH_CHECKOUT") != "1", reason="takes minutes and the network: set TEST_FRESH_CHECKOUT=1")
def test_a_fresh_checkout_reaches_a_running_pytest(tmp_path):
    shutil.copytree(
        ROOT, tmp_path / "checkout", ignore=shutil.ignore_patterns(".venv*", ".git", "build", "*.so", "*.c", "__pycache__", ".*_cache")
    )
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "checkout" / "run.py"), "test", "-q", "tests/test_layering.py"]
    for set_up in (True, False):
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("setting up" in done.stderr) == set_up
