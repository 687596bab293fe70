"""A watcher: what containers do, as it happens, across restarts of the daemon.

    python examples/watch_events.py [EVENTS]

Ends after so many events (never, without a number).
"""

from __future__ import annotations

import asyncio
import sys
import time

from wherry.client import Wherry


async def main(count: int) -> None:
    """A line for each event of a task."""
    async with Wherry() as wherry:
        print("watching", flush=True)
        async for event in wherry.events(['topic~="^/tasks/"']):
            fields = event.fields()
            at = time.strftime("%H:%M:%S", time.localtime(event.at))
            name = fields.get("container_id") or fields.get("id") or "?"
            status = f" with exit code {fields.get('exit_status', 0)}" if event.topic == "/tasks/exit" else ""
            print(f"{at} {event.namespace}/{name} {event.topic.removeprefix('/tasks/')}{status}", flush=True)
            count -= 1
            if count == 0:
                return


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
