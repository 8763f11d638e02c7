"""Ending the background tasks of a process, for certain and in bounded time."""

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

_AGAIN_SECONDS: Final = 0.1


async def end(tasks: Iterable[asyncio.Task[Any]], seconds: float) -> None:
    """Cancel `tasks` every tenth of a second until they have ended; one that has not after `seconds` is named in the log and left behind.

    Once is not enough: a library may take the cancellation for the end of a time limit of its own and answer with another error, and
    the task goes on as if nobody had asked it to end.
    """
    left = {task for task in tasks if not task.done()}
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while left and loop.time() < deadline:
        for task in left:
            task.cancel()
        # Always the whole tenth: the loop counts in milliseconds, and would go round and round in what is left of the last one.
        ended, left = await asyncio.wait(left, timeout=_AGAIN_SECONDS)
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                log.warning("a task ended badly", task=task.get_name(), reason=f"{type(error).__name__}: {error}")
    for task in left:
        log.error("a task did not end", task=task.get_name(), seconds=seconds)
