"""A database for the tests of a program: fresh for each of them, ready before it starts, gone after it.

    python examples/test_database.py IMAGE-WITH-REDIS

The server listens on a unix socket in a folder that both sides see, so that no port can be taken and no network is
needed. In a suite of pytest, `database` is a fixture.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from wherry.client import CommandFailed, Wherry

SERVER = ["redis-server", "--port", "0", "--unixsocket", "/run/db/redis.sock", "--save", "", "--dir", "/tmp"]
READY = ["redis-cli", "-s", "/run/db/redis.sock", "ping"]


@asynccontextmanager
async def database(wherry: Wherry, image: str, seconds: float = 20.0) -> AsyncIterator[str]:
    """A server that answers; the path of its socket on this host."""
    with tempfile.TemporaryDirectory(prefix="database-") as folder:
        mounts = [{"type": "bind", "source": folder, "destination": "/run/db", "options": ["rbind", "rw"]}]
        async with wherry.run(image, SERVER, mounts=mounts, memory=256 << 20) as server:
            async with asyncio.timeout(seconds):
                while True:
                    with contextlib.suppress(CommandFailed):
                        await server.exec(READY, check=True)
                        break
                    await asyncio.sleep(0.05)
            yield f"{folder}/redis.sock"


async def ask(path: str, command: str) -> str:
    """One command and the first line of its answer, in redis' own protocol."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(f"{command}\r\n".encode())
        return (await reader.readline()).decode().strip()
    finally:
        writer.close()
        await writer.wait_closed()


async def main(image: str) -> None:
    """Two tests: the second one sees nothing of the first."""
    async with Wherry() as wherry:
        for number in (1, 2):
            async with database(wherry, image) as path:
                before = await ask(path, "GET answer")
                await ask(path, "SET answer 42")
                after = await ask(path, "STRLEN answer")
                print(f"test {number}: before {before}, length after {after}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
