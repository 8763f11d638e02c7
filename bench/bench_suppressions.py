"""`python -m bench.bench_suppressions`: what a million suppressions cost an engine: loading, memory, and the question per recipient.

    python -m bench.bench_suppressions [--addresses N] [--json]

A private PostgreSQL is started and filled; then a `SuppressionSet` is loaded as an engine does, asked about recipients in groups of 16
(as a turn of the engine does), and told of one more address. No timing is asserted anywhere: this prints numbers.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from domain.suppression_key import parse
from engine.suppression_set import SuppressionSet
from store import embedded, migrate, postgres, suppressions

GROUP = 16
ASKED = 100_000
_FILL = (
    "insert into suppressions (user_id, email_key, reason) "
    "select $1, 'user' || i || '.name@domain' || i % 5000 || '.example', 'import' from generate_series(1, $2::bigint) i"
)


class Recipient(NamedTuple):
    """All the set looks at."""

    email: str


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def microseconds_each(held: SuppressionSet, user: int, recipients: list[Recipient]) -> float:
    """CPU per recipient, the best of three runs."""
    groups = [list(range(at, min(at + GROUP, len(recipients)))) for at in range(0, len(recipients), GROUP)]
    spent = []
    for _ in range(3):
        started = time.process_time()
        for group in groups:
            held.among(user, 1, recipients, group)
        spent.append(time.process_time() - started)
    return min(spent) / len(recipients) * 1e6


async def measure(url: str, addresses: int) -> dict[str, float]:
    """Fill, load, ask."""
    await migrate.apply(url)
    pool = await postgres.open_pool(url, 4, None)
    found: dict[str, float] = {"addresses": addresses}
    try:
        user = await pool.fetchval("insert into users (name) values ('bench') returning id")
        await pool.execute(_FILL, user, addresses)
        await pool.execute("analyze suppressions")
        held = SuppressionSet()
        before, cpu, started = resident_bytes(), time.process_time(), time.perf_counter()
        await held.refresh(pool)
        found["load_seconds"] = time.perf_counter() - started
        found["load_cpu_seconds"] = time.process_time() - cpu
        found["rss_mebibytes"] = (resident_bytes() - before) / 2**20
        assert len(held) == addresses
        step = max(1, addresses // ASKED)
        hits = [Recipient(f"User{i}.Name@domain{i % 5000}.example") for i in range(1, addresses, step)]
        misses = [Recipient(f"other{i}.name@domain{i % 5000}.example") for i in range(1, addresses, step)]
        found["hit_us"] = microseconds_each(held, user, hits)
        found["miss_us"] = microseconds_each(held, user, misses)
        async with postgres.transaction(pool) as conn:
            await suppressions.add(conn, user, None, [parse(text) for text in ("bad.example", "info@*", "*@*.worse.example")], "manual")
        started = time.perf_counter()
        await held.refresh(pool)
        found["one_change_ms"] = (time.perf_counter() - started) * 1e3
        found["miss_with_patterns_us"] = microseconds_each(held, user, misses)
        started = time.perf_counter()
        await held.refresh(pool)
        found["no_change_ms"] = (time.perf_counter() - started) * 1e3
    finally:
        await pool.close()
    return found


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sluice-b-") as directory:
        Path(directory).chmod(0o711)
        with embedded.resolve("embedded:", "embedded:", Path(directory) / "state", durable=False) as backends:
            found = asyncio.run(measure(backends.database_url, options.addresses))
    if options.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
        return
    for name, value in found.items():
        print(f"{name:24}{value:12,.3f}")


if __name__ == "__main__":
    main()
