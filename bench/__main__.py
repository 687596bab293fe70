"""`python -m bench [--check]`: Wherry beside containerd in one run; prints a table of figures and ratios."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from bench import measure, pulls
from bench.daemons import Daemon, Lab


@dataclass(frozen=True)
class Row:
    """One line of the table. `limit` bounds the ratio of the two figures, from above or (`at_least`) from below;
    `most` bounds Wherry's figure by itself."""

    what: str
    unit: str
    wherry: float
    containerd: float
    limit: float | None = None
    at_least: bool = False
    most: float | None = None

    @property
    def ratio(self) -> float:
        """Wherry's figure as a part of containerd's."""
        return self.wherry / self.containerd

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; a row without one always holds."""
        if self.most is not None:
            return self.wherry <= self.most
        if self.limit is None:
            return True
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    def cells(self) -> list[str]:
        """The line as text: figures, ratio, and the limit with its verdict."""
        bound = ""
        if self.most is not None:
            bound = f"at most {self.most:.0f} {self.unit}{'' if self.holds else ' MISSED'}"
        elif self.limit is not None:
            bound = f"{'at least' if self.at_least else 'at most'} {self.limit:.1f}{'' if self.holds else ' MISSED'}"
        return [self.what, self.unit, f"{self.wherry:.1f}", f"{self.containerd:.1f}", f"{self.ratio:.2f}", bound]


def speed(wherry: Daemon, containerd: Daemon, image: str) -> list[Row]:
    """Wall time of one container, and containers a second."""
    times = measure.by_turns(
        [
            measure.run_true(wherry, image, "ctr"),
            measure.run_true(containerd, image, "ctr"),
            measure.run_true(wherry, image, "wherry"),
        ]
    )
    rows = [
        Row("ctr run --rm true", "ms", times[0], times[1], 0.6),
        Row("wherry run --rm true, beside ctr on containerd", "ms", times[2], times[1], 1.0),
    ]
    for at_once, limit in ((1, None), (4, 3.0)):
        ours, theirs = measure.rates_by_turns((wherry, containerd), image, at_once)
        rows.append(Row(f"containers a second, {at_once} at once", "1/s", ours, theirs, limit, at_least=True))
    return rows


def weight(wherry: Daemon, containerd: Daemon, image: str) -> list[Row]:
    """Memory with sleeping containers, and the way back after SIGKILL with all of them."""
    rows = []
    for count in (1, 20, 50):
        for daemon in (wherry, containerd):
            measure.fill(daemon, image, count)
        ours, theirs = measure.memory(wherry), measure.memory(containerd)
        rows.append(Row(f"PSS of a shim, {count} containers", "kB", ours[0], theirs[0], 1.0 if count > 1 else None))
        rows.append(Row(f"PSS of all, {count} containers", "kB", ours[1], theirs[1], 1.0 if count >= 20 else None))
    ours_ms, theirs_ms = (measure.restart(daemon) * 1000 for daemon in (wherry, containerd))
    rows.append(Row("SIGKILL to serving again, 50 containers", "ms", ours_ms, theirs_ms))
    return rows


def images(lab: Lab) -> list[Row]:
    """Pulls with cold caches, pulls of what is there, and memory meanwhile."""
    wherry, containerd = lab.daemons
    small = pulls.cold_by_turns(lab.daemons, pulls.publish(lab, "small", pulls.SMALL))
    image = pulls.publish(lab, "big", pulls.BIG)
    big = pulls.cold_by_turns(lab.daemons, image)
    again = [pulls.again(daemon, image) for daemon in (wherry, containerd)]
    memory = [pulls.peak(daemon, image) for daemon in (wherry, containerd)]
    return [
        Row("pull 1 GB, 80,000 files, 3 layers", "ms", big[0], big[1], 0.5),
        Row("pull 20,000 small files, 1 layer", "ms", small[0], small[1], 0.6),
        Row("pull what is there", "ms", again[0], again[1], most=100),
        Row("PSS of all while pulling 1 GB", "MB", memory[0], memory[1], most=250),
    ]


def main() -> int:
    """Measure, print; with --check exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    parser.add_argument("--only", choices=["speed", "weight", "images"], help="one part of the table")
    options = parser.parse_args()
    rows: list[Row] = []
    with Lab() as lab:
        wherry, containerd = lab.daemons
        for name, part in (("speed", speed), ("weight", weight)):
            if options.only in (None, name):
                rows += part(wherry, containerd, lab.image)
        if options.only in (None, "images"):
            rows += images(lab)
    table = [["", "unit", "Wherry", "containerd", "ratio", "limit"], *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for number, line in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    missed = [row.what for row in rows if not row.holds]
    if missed:
        print(f"{len(missed)} limit(s) missed: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
