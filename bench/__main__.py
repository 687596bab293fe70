"""`python -m bench [--check]`: Wherry beside containerd in one run; prints a table of figures and ratios."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import crowd as crowd_
from bench import library, measure, pulls, rootless
from bench import starts as starts_
from bench.api import Failed
from bench.cli import figures
from bench.cri import pods_by_turns
from bench.daemons import Daemon, Lab

# kB of PSS, with 50 containers sleeping
SHIM_MOST = 1800
# milliseconds: a sandbox's exec takes single ones
EXEC_MOST = 10
PICTURE = Path(__file__).parent.parent / "docs" / "starts.svg"


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
        if self.most is not None and self.wherry > self.most:
            return False
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
        most = SHIM_MOST if count == 50 else None
        limit = 1.0 if count > 1 else None
        rows.append(Row(f"PSS of a shim, {count} containers", "kB", ours[0], theirs[0], limit, most=most))
        rows.append(Row(f"PSS of all, {count} containers", "kB", ours[1], theirs[1], 1.0 if count >= 20 else None))
    ours_ms, theirs_ms = (measure.restart(daemon) * 1000 for daemon in (wherry, containerd))
    rows.append(Row("SIGKILL to serving again, 50 containers", "ms", ours_ms, theirs_ms))
    return rows


def starts(wherry: Daemon, containerd: Daemon, image: str) -> list[Row]:
    """Latencies of starts and execs; their picture goes to docs/."""
    daemons = (wherry, containerd)
    execs = starts_.execs_by_turns(daemons, image)
    boxes = starts_.sandbox_execs_by_turns(daemons, image)
    rows = [
        Row("exec of true over the API", "ms", execs[0], execs[1], 0.5),
        Row("exec of true by the client, in a sandbox", "ms", boxes[0], boxes[1], most=EXEC_MOST),
    ]
    found = starts_.by_turns(daemons, image)
    for number, (ours, theirs) in found.items():
        for percent in (50, 99):
            what = f"start of a container, p{percent}, {number} at once"
            rows.append(Row(what, "ms", ours.percentile(percent), theirs.percentile(percent), 0.6))
    four, sixteen = found[4][0].rate, found[16][0].rate
    rows.append(Row("Wherry's rate, 16 at once beside 4 at once", "1/s", sixteen, four, 0.9, at_least=True))
    PICTURE.write_text(starts_.picture(found, daemons))
    return rows


def crowd(wherry: Daemon, containerd: Daemon, image: str) -> list[Row]:
    """The way back with 200 containers. containerd's column has its time with those that it has: none or 50."""
    plain, disturbed = crowd_.return_of(wherry, image)
    theirs = measure.restart(containerd) * 1000
    what = f"{crowd_.CONTAINERS} containers"
    return [
        Row(f"SIGKILL to serving, {what}", "ms", plain.serving * 1000, theirs, most=1000),
        Row(f"SIGKILL to all shims, {what}", "ms", plain.connected * 1000, theirs, most=3000),
        Row("the same, one shim stopped, one socket dead: serving", "ms", disturbed.serving * 1000, theirs, most=1000),
        Row("the same: all other shims", "ms", disturbed.connected * 1000, theirs, most=3000),
    ]


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


def runtime(lab: Lab) -> list[Row]:
    """The bundled runtime beside the others' command lines; the second figure is runc's, and crun's."""
    folder = lab.folder / "runtime"
    found = library.measured(folder)
    return [
        Row("wherry-runtime run true, beside runc", "ms", *library.commands(folder), 1.3),
        Row("create, start, delete by the library, beside crun", "ms", *found["life"], 1.0),
        Row("exec of true by the library, beside crun", "ms", *found["exec"], 1.0),
    ]


def cri(lab: Lab) -> list[Row]:
    """A pod with one container as a kubelet asks for it, until it runs."""
    found = pods_by_turns(lab)
    return [
        Row(f"pod with one container over the CRI, {network}", "ms", found[key][0], found[key][1], 0.6)
        for key, network in (("host", "host network"), ("cni", "CNI bridge"))
    ] + [Row("PSS of all, 50 pods with one container", "kB", found["weight"][0], found["weight"][1], 1.0)]


def main() -> int:
    """Measure, print; with --check exit 1 where a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    parser.add_argument(
        "--only",
        choices=["speed", "starts", "weight", "crowd", "cli", "cri", "images", "runtime", "rootless"],
        help="one part of the table",
    )
    options = parser.parse_args()
    rows: list[Row] = []
    with Lab() as lab:
        wherry, containerd = lab.daemons
        for name, part in (("speed", speed), ("starts", starts), ("weight", weight), ("crowd", crowd)):
            if options.only in (None, name):
                rows += part(wherry, containerd, lab.image)
        if options.only in (None, "cli"):
            # the second figure is podman's
            rows += [Row(what, "ms", ours, theirs, limit) for what, ours, theirs, limit in figures(wherry, lab.image)]
        if options.only in (None, "cri"):
            rows += cri(lab)
        if options.only in (None, "images"):
            rows += images(lab)
        if options.only in (None, "runtime"):
            rows += runtime(lab)
        if options.only in (None, "rootless"):
            # the second figure is podman's
            rows += [Row(what, "ms", ours, theirs, limit) for what, ours, theirs, limit in rootless.figures(lab.image)]
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
    try:
        sys.exit(main())
    except Failed as failure:
        sys.exit(f"bench: {failure}")
