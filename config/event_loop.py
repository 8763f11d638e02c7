"""The event loop of our processes."""

import os
from collections.abc import Coroutine
from typing import Final, TypeVar

import uvloop

T = TypeVar("T")

# uvloop looks names up in libuv's threads, at most half of them at once, and has four if nobody says more: two names whose name servers are
# silent would hold up every other connection
_RESOLVER_THREADS: Final = 64


def run(main: Coroutine[object, object, T]) -> T:
    """Run `main` in a uvloop of its own, as `asyncio.run` does; returns what it returns."""
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(_RESOLVER_THREADS))  # read when the first name is looked up
    return uvloop.run(main)
