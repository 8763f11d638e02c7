"""`python -m engine --slot N`: one sending process."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from config import event_loop, load
from config.settings import Settings
from domain.errors import SluiceError, Unavailable
from engine.app import Engine
from store import embedded

_LONGEST_PAUSE_SECONDS = 5.0
_SAY_AGAIN_SECONDS = 60.0


def main() -> int:
    """Run until told to stop. Exit code 1: a part of the engine died; 2: the settings are not usable."""
    parser = argparse.ArgumentParser(prog="python -m engine", description="One Sluice engine process.")
    parser.add_argument("--slot", type=int, default=0, help="number of this process on its machine, from 0")
    arguments = parser.parse_args()
    try:
        config = os.environ.get("SLUICE_CONFIG")
        settings = load.load(Path(config) if config else None)
        with _stores(settings) as backends:
            settings = load.with_stores(settings, backends.database_url, backends.redis_url)

            async def run() -> bool:
                return await Engine(settings, arguments.slot).run()

            return 0 if event_loop.run(run()) else 1
    except SluiceError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _stores(settings: Settings) -> Iterator[embedded.Backends]:
    """The stores of the settings, waited for as long as it takes: an engine that is started while they are away begins when they are back.

    A private server that cannot be started is not waited for. Raises Unavailable then, and ConfigurationError.
    """
    if "embedded:" in (settings.database.url, settings.redis.url):
        with embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)) as backends:
            yield backends
        return
    pause, said_at = 0.25, 0.0
    while True:
        try:
            with contextlib.ExitStack() as checked:
                found = checked.enter_context(embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)))
        except Unavailable as error:
            if not said_at or time.monotonic() - said_at >= _SAY_AGAIN_SECONDS:
                print(f"engine: waiting: {error}", file=sys.stderr, flush=True)
                said_at = time.monotonic()
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE_SECONDS, 2 * pause)
            continue
        yield found
        return


if __name__ == "__main__":
    sys.exit(main())
