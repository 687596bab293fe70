"""An agent's sandbox: prepare once, try twenty ideas at the same time, keep the best.

    python examples/code_sandbox.py IMAGE

Each idea runs in a fork of the prepared sandbox: the same files, a file system of its own, no network, limits on
memory, processes, disk and time. What one breaks, no other sees. The best one is forked further, the others go.
"""

from __future__ import annotations

import asyncio
import sys

from wherry.client import CommandFailed, Sandbox, TimedOut, Wherry

IDEAS = 20
SECONDS = 5.0


def program(number: int) -> str:
    """What an agent might come up with: some ideas work, one is wrong, one never ends, one destroys its files."""
    match number % 5:
        case 1:
            return "exit 1"
        case 2:
            return "while :; do :; done"
        case 3:
            return "rm -rf /data /bin/cat 2>/dev/null; cat /data/numbers"
        case _:
            return f"awk '{{ s += $1 * {number} }} END {{ print s }}' /data/numbers"


async def attempt(box: Sandbox, number: int) -> int | None:
    """The score of an idea; None where it failed."""
    try:
        done = await box.exec(["sh", "-c", program(number)], timeout=SECONDS, output=1 << 16, check=True)
        return int(done.text)
    except (CommandFailed, ValueError) as error:
        kind = "took too long" if isinstance(error, TimedOut) else "failed"
        print(f"idea {number:2}: {kind}")
        return None


async def main(image: str) -> None:
    """Prepare, fork, choose."""
    async with Wherry() as wherry, wherry.sandbox(image, memory=64 << 20, pids=32, ttl=120.0) as prepared:
        await prepared.write("/data/numbers", "\n".join(str(number) for number in range(1000)))
        forks = await prepared.fork(IDEAS)
        scores = await asyncio.gather(*(attempt(fork, number) for number, fork in enumerate(forks)))
        best = max(range(IDEAS), key=lambda number: scores[number] or 0)
        (further,) = await forks[best].fork()
        await asyncio.gather(*(fork.close() for fork in forks))
        print(f"{sum(score is not None for score in scores)} of {IDEAS} worked, idea {best} is best: {scores[best]}")
        print("its fork has", (await further.exec(["wc", "-l", "/data/numbers"])).text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
