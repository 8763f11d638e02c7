"""`python -m engine --slot N`: one sending process."""

import argparse
import os
import sys
from pathlib import Path

import msgspec
import uvloop

from config import load
from domain.errors import SluiceError
from engine.app import Engine
from store import embedded


def main() -> int:
    """Run until told to stop. Exit code 2: the settings or the stores are not usable."""
    parser = argparse.ArgumentParser(prog="python -m engine", description="One Sluice engine process.")
    parser.add_argument("--slot", type=int, default=0, help="number of this process on its machine, from 0")
    arguments = parser.parse_args()
    try:
        config = os.environ.get("SLUICE_CONFIG")
        settings = load.load(Path(config) if config else None)
        with embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)) as backends:
            settings = msgspec.structs.replace(
                settings,
                database=msgspec.structs.replace(settings.database, url=backends.database_url),
                redis=msgspec.structs.replace(settings.redis, url=backends.redis_url),
            )

            async def run() -> None:
                await Engine(settings, arguments.slot).run()

            uvloop.run(run())
    except SluiceError as error:
        print(f"engine: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
