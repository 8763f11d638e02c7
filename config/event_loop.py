"""How our processes begin: their event loop and what they ask of the C library."""

import ctypes
import os
from collections.abc import Coroutine
from typing import Final, TypeVar

import uvloop

T = TypeVar("T")

# uvloop looks names up in libuv's threads, at most half of them at once, and has four if nobody says more: two names whose name servers are
# silent would hold up every other connection
_RESOLVER_THREADS: Final = 64

# mallopt(3). A batch of recipients comes and goes in blocks of some hundred kilobytes. glibc would give them back to the system each time,
# which clears every page of the next one: an engine had a page fault every five to ten messages
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_KEPT_FREE_OCTETS: Final = 16 << 20
_LARGEST_KEPT_OCTETS: Final = 32 << 20  # the most glibc takes


def run(main: Coroutine[object, object, T]) -> T:
    """Run `main` in a uvloop of its own, as `asyncio.run` does; returns what it returns."""
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(_RESOLVER_THREADS))  # read when the first name is looked up
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every C library has it
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_OCTETS)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_OCTETS)
    return uvloop.run(main)
