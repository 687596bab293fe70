"""A transfer's progress as people see it: a line for each thing on a terminal, else a line when something is done."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import TYPE_CHECKING

from wherry.cli.output import size
from wherry.cli.terminal import window

if TYPE_CHECKING:
    from wherry.client.transfer import Progress

# seconds between two pictures of the progress: fast enough for the eye, slow enough for a terminal
REFRESH = 0.1
# seconds over which a rate is taken: it follows changes, and doesn't tremble
WINDOW = 3.0
# what daemons call things, in one word; the rest is shown as it is
WORDS = {"already exists": "exists", "complete": "done", "completed": "done", "fetching image content": "resolved"}
FINAL = ("done", "exists", "extracted", "saved", "uploaded")
MOVING = ("downloading", "uploading", "copying")
BAR = 20


class Thing:
    """One layer or document on its way: its state, and how fast it moves."""

    def __init__(self, name: str) -> None:
        # twelve digits of a digest are enough for a person, and a line that wraps spoils the picture
        self.name = re.sub(r"(sha\d+:[0-9a-f]{12})[0-9a-f]+", r"\1", name)
        self.event = ""
        self.progress = 0
        self.total = 0
        self._seen: list[tuple[float, int]] = []

    def update(self, step: Progress, now: float) -> bool:
        """Take a step in; whether the state is another one now."""
        before, self.event = self.event, WORDS.get(step.event, step.event)
        self.progress, self.total = step.progress, step.total
        if self.event in MOVING:
            self._seen.append((now, step.progress))
            while len(self._seen) > 2 and self._seen[0][0] < now - WINDOW:
                self._seen.pop(0)
        return before != self.event

    @property
    def rate(self) -> float:
        """Bytes a second; 0 where that can't be said yet."""
        if self.event not in MOVING or len(self._seen) < 2:
            return 0.0
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        return max(0, end - start) / (last - first) if last > first else 0.0

    def line(self, columns: int) -> str:
        """As one line, no wider than the terminal."""
        text = f"{self.name:<32} {self.event:<12}"
        if self.event in MOVING and self.total > 0:
            filled = min(BAR, BAR * self.progress // self.total)
            text += f" [{'=' * filled}{' ' * (BAR - filled)}] {size(self.progress)}/{size(self.total)}"
            if rate := self.rate:
                text += f"  {size(int(rate))}/s  {_time(max(0, self.total - self.progress) / rate)} left"
        elif self.total > 0:
            text += f" {size(self.total)}"
        return text.rstrip()[: max(20, columns - 1)]


def _time(seconds: float) -> str:
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02}m"


class Display:
    """The picture of a transfer. `live` redraws it on stderr, else what is done gets a line there."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._things: dict[str, Thing] = {}
        self._lines = 0
        self._drawn = 0.0
        self._began = time.monotonic()
        self._said = ""

    def add(self, step: Progress) -> None:
        """Take in one step."""
        now = time.monotonic()
        if not step.name:
            self._said = step.event
            if not self._live:
                sys.stderr.write(f"{step.event}\n")
            return
        thing = self._things.setdefault(step.name, Thing(step.name))
        changed = thing.update(step, now)
        if self._live:
            self.draw()
        elif changed and thing.event in FINAL:
            sys.stderr.write(thing.line(200) + "\n")

    def draw(self, *, last: bool = False) -> None:
        """All lines anew, over those that were drawn before."""
        now = time.monotonic()
        if not self._live or (not last and now - self._drawn < REFRESH):
            return
        self._drawn = now
        columns, rows = window() or (120, 50)
        lines = [thing.line(columns) for thing in self._shown(rows - 3)]
        lines.append(self._summary(now - self._began)[: columns - 1])
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stderr.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[0J")
        sys.stderr.flush()
        self._lines = len(lines)

    def _shown(self, room: int) -> list[Thing]:
        """What fits on the screen; where not everything does, what is done gives way first."""
        things = list(self._things.values())
        if len(things) <= max(room, 1):
            return things
        active = [thing for thing in things if thing.event not in (*FINAL, "waiting")]
        others = [thing for thing in things if thing not in active]
        keep = {*map(id, (active + others)[: max(room, 1)])}
        return [thing for thing in things if id(thing) in keep]

    def _summary(self, passed: float) -> str:
        layers = [thing for thing in self._things.values() if thing.total > 0]
        done = sum(thing.total if thing.event in (*FINAL, "extracting") else thing.progress for thing in layers)
        rate = sum(thing.rate for thing in layers)
        total = sum(thing.total for thing in layers)
        finished = sum(thing.event in FINAL for thing in layers)
        text = f"{finished}/{len(layers)} done, {size(done)}/{size(total)}, {_time(passed)}"
        return text + (f", {size(int(rate))}/s, {_time(max(0, total - done) / rate)} left" if rate else "")


class JsonLines:
    """A JSON object on stdout for each step, for programs; `event` is the daemon's word, bytes are numbers."""

    def add(self, step: Progress) -> None:
        """Take in one step."""
        value = {"event": step.event, "name": step.name, "parents": list(step.parents)}
        sys.stdout.write(json.dumps({**value, "progress": step.progress, "total": step.total}) + "\n")
        sys.stdout.flush()

    def draw(self, *, last: bool = False) -> None:
        """Nothing: every line was written."""


class Silence:
    """No progress at all."""

    def add(self, step: Progress) -> None:
        """Nothing."""

    def draw(self, *, last: bool = False) -> None:
        """Nothing."""
