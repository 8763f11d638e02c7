"""`python -m inbound`: the process for what the world sends back."""

import os
import sys
from pathlib import Path
from typing import Final

from config import event_loop, load, logs
from domain.errors import SluiceError
from inbound.app import Inbound
from store import embedded

NICENESS: Final = 5  # when processor time is short, sending comes first: strangers decide how busy this process is


def main() -> int:
    """Run until told to stop. Exit code 1: a part of the process died; 2: the settings, the ports or the stores are not usable."""
    try:
        config = os.environ.get("SLUICE_CONFIG")
        settings = load.load(Path(config) if config else None)
        logs.configure(settings.node.log_level)
        with embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)) as backends:
            settings = load.with_stores(settings, backends.database_url, backends.redis_url)

            os.nice(NICENESS)  # not before: private servers that are started here serve the engines, too

            async def run() -> bool:
                return await Inbound(settings).run()

            return 0 if event_loop.run(run()) else 1
    except SluiceError as failure:
        sys.stderr.write(f"inbound: {failure}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
