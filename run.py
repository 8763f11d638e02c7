#!/usr/bin/env python3
"""Launcher for a fresh machine: sets up .venv beside this file when needed, then runs Sluice in it.

    python3 run.py demo [options]     send a real campaign to a private sink on this machine
    python3 run.py test [options]     run the tests (options go to pytest)
    python3 run.py WORD ...           anything else is given to the `sluice` command

Standard library only, and it must parse on Python 3.8, so that an old interpreter gets a sentence instead of a syntax
error. Nothing is installed outside .venv, except a missing compiler or Python header when run as root (SLUICE_NO_SYSTEM=1
forbids that too).
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".stamp"
LOG = VENV / "setup.log"
OLDEST = (3, 11)
NEWEST_MINOR = 14
EXTENSION_ROOMS = ("ext", "bench")
# For interpreters without ensurepip and machines without pip (Debian without python3-venv)
PIP_WHEEL = (
    "https://files.pythonhosted.org/packages/07/25/ee8c38ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/pip-26.3-py3-none-any.whl",
    "f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13",
)
DOWNLOAD_TIMEOUT_SECONDS = 60
STEP_TIMEOUT_SECONDS = 1800
SETUP_FAILED = 2  # the exit code of `sluice` for usage and set-up errors


class SetupError(Exception):
    """A sentence for the user: what is missing and what to type."""


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0 if arguments else SETUP_FAILED
    try:
        use_new_enough_interpreter()
        wanted = stamps()
        if read_stamp() != wanted:
            set_up(wanted)
    except SetupError as error:
        say(str(error))
        return SETUP_FAILED
    except KeyboardInterrupt:
        say("interrupted; the next start goes on where it is safe to")
        return 130
    environment = clean_environment()
    if arguments[0] == "test":
        os.chdir(ROOT)
        command = [str(PYTHON), "-m", "pytest", *arguments[1:]]
    else:
        command = [str(VENV / "bin" / "sluice"), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    return os.execve(command[0], command, environment)  # does not return


def use_new_enough_interpreter():
    """Go on in a Python that is new enough, if this one is not."""
    if sys.version_info[:2] >= OLDEST:
        return
    for minor in range(NEWEST_MINOR, OLDEST[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)
        # A shim of a version manager may exist for a version that is not installed: ask it
        if found and answers([found, "-c", "import sys; sys.exit(sys.version_info[:2] < (3, 11))"]):
            os.execv(found, [found, str(Path(__file__).resolve()), *sys.argv[1:]])
    raise SetupError(
        "Sluice needs Python 3.11 or newer, this is %s and no newer one is on PATH. Install one, for example:\n"
        "  Debian 12, Ubuntu 24.04: apt-get install python3   RHEL 9: dnf install python3.11   macOS: brew install python"
        % platform.python_version()
    )


def stamps():
    """What the environment and the compiled modules were made from, as two hashes."""
    environment = hashlib.sha256(repr((sys.version, sysconfig.get_platform(), str(ROOT))).encode())
    for name in ("requirements.lock", "pyproject.toml", "setup.py"):
        environment.update((ROOT / name).read_bytes() + b"\0")
    flags = [os.environ.get(name, "") for name in ("SLUICE_CYTHON_DEBUG", "SLUICE_NATIVE")]
    extensions = hashlib.sha256(repr(flags).encode())
    for path in sources():
        extensions.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {"environment": environment.hexdigest(), "extensions": extensions.hexdigest()}


def sources():
    return sorted(path for room in EXTENSION_ROOMS for pattern in ("*.pyx", "*.pxd", "*.pxi") for path in (ROOT / room).glob(pattern))


def read_stamp():
    """The stamps of what is there; empty when it is missing, incomplete or cannot be used."""
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not os.access(str(PYTHON), os.X_OK):
        return {}
    built = {path.name.split(".")[0] for room in EXTENSION_ROOMS for path in (ROOT / room).glob("*.so")}
    if any(path.suffix == ".pyx" and path.stem not in built for path in sources()):
        found.pop("extensions", None)  # `git clean` took them away
    return found


def set_up(wanted):
    """Make .venv and the compiled modules what the sources ask for; whatever fails leaves no valid stamp behind."""
    if not os.access(str(ROOT), os.W_OK) or (VENV.exists() and not os.access(str(VENV), os.W_OK)):
        raise SetupError(
            "%s is not writable for user %s, and .venv has to be made or renewed there; "
            "run as its owner, or work in a checkout of your own" % (ROOT, os.environ.get("USER") or os.getuid())
        )
    lock = os.open(str(ROOT), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("another run.py is setting up %s; waiting for it" % VENV)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        found = read_stamp()
        if found == wanted:
            return
        begin = time.monotonic()
        check_toolchain()
        if found.get("environment") != wanted["environment"]:
            say("setting up %s (once; a minute or less)" % VENV)
            if STAMP.exists():
                STAMP.unlink()
            step("virtual environment", make_venv)
            installer = step("installer", choose_installer)
            step("packages (hashes checked)", lambda: install_packages(installer))
            step("compiled modules and the sluice command", lambda: install_sluice(installer))
        else:
            step("compiled modules", build_extensions)
        partial = STAMP.with_name(".stamp.new")
        partial.write_text(json.dumps(wanted))
        os.replace(str(partial), str(STAMP))
        say("ready after %.1f s" % (time.monotonic() - begin))
    finally:
        os.close(lock)


def step(name, work):
    begin = time.monotonic()
    result = work()
    note = " (%s)" % result[0] if isinstance(result, tuple) else ""
    say("%6.1f s  %s%s" % (time.monotonic() - begin, name, note))
    return result


def check_toolchain():
    """A C compiler and Python.h, which no wheel brings along."""
    compiler = os.environ.get("CC", "").split()[:1] or ["cc", "gcc"]
    has_compiler = any(shutil.which(name) for name in compiler)
    has_header = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    # gcc without the C library's headers compiles nothing; stdlib.h stands for them
    has_libc = not sys.platform.startswith("linux") or os.path.exists("/usr/include/stdlib.h") or not os.path.exists("/usr/bin/dpkg")
    if has_compiler and has_header and has_libc:
        return
    missing = [
        what
        for what, there in (("a C compiler", has_compiler), ("Python.h", has_header), ("the C library's headers", has_libc))
        if not there
    ]
    command = system_install_command()
    what = "Sluice compiles its hot path and misses %s" % " and ".join(missing)
    if not command:
        raise SetupError("%s; install gcc and the development files of Python %d.%d" % ((what, *sys.version_info[:2])))
    if os.geteuid() != 0:
        raise SetupError("%s. Type this once:\n  sudo sh -c '%s'" % (what, command))
    if os.environ.get("SLUICE_NO_SYSTEM") == "1":
        raise SetupError("%s. Type this once:\n  %s" % (what, command))
    say("%s; running: %s" % (what, command))

    def install():
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        done = subprocess.run(command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise SetupError("that command failed with exit code %d; install these packages yourself and try again" % done.returncode)

    step("system packages", install)


def system_install_command():
    """The one line that installs compiler and headers with this system's package manager; empty if we know none."""
    version = "%d.%d" % sys.version_info[:2]
    if shutil.which("apt-get"):
        return "apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev libpython%s-dev" % version
    if shutil.which("dnf"):
        is_default = os.path.realpath("/usr/bin/python3").endswith(version)
        return "dnf install -y -q gcc python%s-devel" % ("3" if is_default else version)
    if shutil.which("zypper"):
        return "zypper -q install -y gcc python%s-devel" % version.replace(".", "")
    if shutil.which("apk"):
        return "apk add -q gcc musl-dev linux-headers python3-dev"
    if shutil.which("pacman"):
        return "pacman -S --needed --noconfirm gcc"
    return ""


def make_venv():
    """A virtual environment of this interpreter, without pip: that comes in the next step."""
    probe = "import sys; print(sys.version); print(sys.prefix)"
    if PYTHON.exists():
        done = subprocess.run([str(PYTHON), "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0 and done.stdout.decode() == "%s\n%s\n" % (sys.version, VENV):
            return  # same interpreter, same place: packages are brought up to date in it
    if VENV.exists():
        shutil.rmtree(str(VENV))
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        said = done.stdout.decode(errors="replace").strip()
        raise SetupError("python3 -m venv failed: %s\nOn Debian: apt-get install python3-venv" % said)


def choose_installer():
    """(name, command line up to `install`): uv if it is on PATH, else a pip inside the environment."""
    uv = shutil.which("uv")
    if uv and answers([uv, "--version"]):
        return "uv", [uv, "pip", "install", "--python", str(PYTHON)]
    options = ["--disable-pip-version-check", "--no-input"]
    pip = [str(PYTHON), "-m", "pip", *options, "install", "--root-user-action=ignore"]
    if answers([str(PYTHON), "-m", "pip", "--version"]):
        return "pip", pip
    if importlib.util.find_spec("ensurepip") is not None and answers([str(PYTHON), "-m", "ensurepip", "--default-pip"]):
        return "pip of this Python", pip
    if answers([sys.executable, "-m", "pip", "--python", str(PYTHON), "--version"]):
        return "pip of the system", [sys.executable, "-m", "pip", "--python", str(PYTHON), *options, "install"]
    url, digest = PIP_WHEEL
    with tempfile.TemporaryDirectory() as directory:
        wheel = os.path.join(directory, url.rpartition("/")[2])
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer:
                content = answer.read()
        except OSError as error:
            advice = "On Debian: apt-get install python3-venv"
            raise SetupError("pip is missing and could not be fetched from %s: %s\n%s" % (url, error, advice)) from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise SetupError("%s is not the file we know (its SHA-256 differs); is something between us and PyPI?" % url)
        Path(wheel).write_bytes(content)
        # A wheel of pip runs from its own zip and installs itself
        run([str(PYTHON), os.path.join(wheel, "pip"), "install", "--no-index", "--disable-pip-version-check", wheel])
    return "pip fetched from PyPI", pip


def install_packages(installer):
    _, install = installer
    run([*install, "--quiet", "--require-hashes", "-r", str(ROOT / "requirements.lock")])


def install_sluice(installer):
    _, install = installer
    run([*install, "--quiet", "--no-build-isolation", "--no-deps", "-e", str(ROOT)])


def build_extensions():
    run([str(PYTHON), "setup.py", "--quiet", "build_ext", "--inplace"])


def run(command):
    """Run one step with its output in a log; its end is shown when it fails."""
    with LOG.open("ab") as log:
        log.write(("\n$ %s\n" % " ".join(command)).encode())
        log.flush()
        try:
            done = subprocess.run(
                command,
                cwd=str(ROOT),
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=STEP_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SetupError("gave up after %d s: %s\nAll output is in %s" % (STEP_TIMEOUT_SECONDS, " ".join(command), LOG)) from None
    if done.returncode != 0:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-25:])
        raise SetupError("this step failed (exit code %d), its output ends with:\n%s\nAll of it is in %s" % (done.returncode, tail, LOG))


def clean_environment():
    """Ours, without what would send packages elsewhere or mix in those of another Python."""
    unwanted = ("PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "VIRTUAL_ENV", "CONDA_PREFIX")
    return {name: value for name, value in os.environ.items() if name not in unwanted}


def answers(command):
    """Does this command run and exit with 0?"""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean_environment(),
            cwd="/", timeout=DOWNLOAD_TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def say(text):
    print("run.py: %s" % text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
