"""config.tasks: what runs in the background ends when it is told to, whatever a library makes of a cancellation."""

import asyncio

from config import tasks


async def deaf(times: int) -> None:
    """Takes a cancellation for something else `times` times, as a client library may."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            times -= 1
            if times < 0:
                raise


async def test_a_task_that_loses_its_cancellation_is_cancelled_again() -> None:
    running = [asyncio.create_task(deaf(times)) for times in (0, 1, 3)]
    await asyncio.sleep(0)
    await tasks.end(running, 10.0)
    assert [task.cancelled() for task in running] == [True, True, True]


async def test_a_task_that_never_ends_is_left_behind_in_bounded_time() -> None:
    # One cancellation at once and one for each tenth of a second begun: three at most, however the loop rounds its times.
    never = asyncio.create_task(deaf(3))
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await tasks.end([never], 0.25)
    assert not never.done()
    await tasks.end([never], 10.0)
    assert never.cancelled()


async def test_tasks_that_ended_before_are_no_trouble() -> None:
    async def fails() -> None:
        raise ValueError("no")

    running = [asyncio.create_task(asyncio.sleep(0)), asyncio.create_task(fails())]
    await asyncio.wait(running)
    await tasks.end(running, 1.0)
