"""Builds the Cython modules; everything else is in pyproject.toml.

SLUICE_CYTHON_DEBUG=1  bounds and overflow checks on, no optimisation: the tests must pass with it too
SLUICE_NATIVE=1        code for this machine's processor only; never in a wheel that is given away
"""

import os
import platform
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
ROOMS = ("ext", "bench")

debug = os.environ.get("SLUICE_CYTHON_DEBUG") == "1"
native = os.environ.get("SLUICE_NATIVE") == "1"

# -g0: the debug information of generated C doubles the size and half the time of the build
compile_args = ["-O1", "-g"] if debug else ["-O3", "-g0"]
if native:
    compile_args.append("-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native")

directives = {
    "boundscheck": debug,
    "wraparound": debug,
    "cdivision": True,  # in both builds: it changes what the code means, not only what is checked
    "overflowcheck": debug,
    "nonecheck": debug,
    "embedsignature": True,
    "freethreading_compatible": True,
    "autotestdict": False,
}

os.chdir(ROOT)  # module names come from paths relative to the root

# A module built with other flags looks up to date by its time stamp: the last flags are kept, a change builds all anew
record = Path("build/flags")
flags = f"{compile_args} {directives}\n"
changed = not record.exists() or record.read_text() != flags
record.parent.mkdir(exist_ok=True)
record.write_text(flags)

extensions = [
    Extension(f"{room}.{path.stem}", [str(path)], extra_compile_args=compile_args)
    for room in ROOMS
    for path in sorted(Path(room).glob("*.pyx"))
]

setup(
    ext_modules=cythonize(
        extensions,
        language_level=3,
        compiler_directives=directives,
        nthreads=2,
        build_dir="build/cython",
        force=changed,
    ),
    options={"build_ext": {"parallel": 2, "force": changed}},
)
