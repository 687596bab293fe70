"""A step of a CI job: a checkout goes into a container, commands run in it, what they made comes out.

    python examples/ci_step.py IMAGE CHECKOUT RESULTS COMMAND...

The output appears as it comes, the exit code is the command's. Nothing of the step stays: not its container, not its
files, also when it is interrupted.
"""

from __future__ import annotations

import asyncio
import sys

from wherry.client import Wherry
from wherry.client.programs import Program

MEMORY = 1 << 30
SECONDS = 600.0


async def show(program: Program) -> None:
    """Both streams, line by line."""

    async def pump(reader: asyncio.StreamReader, prefix: str) -> None:
        async for line in reader:
            print(prefix + line.decode(errors="replace"), end="", flush=True)

    await asyncio.gather(pump(program.stdout, "  "), pump(program.stderr, "! "))


async def main(image: str, checkout: str, results: str, command: list[str]) -> int:
    """The step's exit code."""
    async with Wherry() as wherry, wherry.sandbox(image, memory=MEMORY, pids=512, ttl=SECONDS, cwd="/work") as box:
        await box.store(checkout, "/work")
        print(f"$ {' '.join(command)}", flush=True)
        async with box.process(command, env={"CI": "true"}) as program:
            await show(program)
            status = (await program.wait()).status
        async with box.files() as files:
            made = await asyncio.to_thread(files.exists, "/work/results")
        if made:
            await box.fetch("/work/results", results)
        print(f"exit code {status}, results {'in ' + results if made else 'none'}")
        return status


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])))
