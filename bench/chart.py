"""Figures over a few numbers of containers at once as SVG, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 340, 60, 150, 40, 44
_COLOURS = {"wherry": "#0a66c2", "containerd": "#c2570a"}
_STYLE = (
    "text{font:12px sans-serif;fill:#444}.grid{stroke:#8884}.axis{stroke:#888}polyline{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}}"
)


def draw(title: str, numbers: Sequence[int], lines: Mapping[str, Sequence[float]], across: str, up: str) -> str:
    """One line for each name, over `numbers`, which stand at equal distances; the scale is logarithmic to base 2.

    A name's first word chooses the colour, a second one that begins with "p99" makes the line dashed.
    """
    floor = HEIGHT - BOTTOM
    low, high = 1.0, 2.0
    values = [value for line in lines.values() for value in line]
    while low * 2 <= min(values):
        low *= 2
    high = low
    rungs = 0
    while high < max(values):
        high, rungs = high * 2, rungs + 1
    width, height = WIDTH - LEFT - RIGHT, floor - TOP

    def place(index: int, value: float) -> tuple[float, float]:
        at, step = low, 0.0
        while at * 2 <= value:
            at, step = at * 2, step + 1
        return LEFT + index / (len(numbers) - 1) * width, floor - (step + value / at - 1) / rungs * height

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="18">{escape(title)}</text><text x="8" y="{TOP - 6}">{escape(up)}</text>',
    ]
    for rung in range(rungs + 1):
        _, y = place(0, low * 2**rung)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{low * 2**rung:g}</text>')
    for index, number in enumerate(numbers):
        x, _ = place(index, low)
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{number}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT + width}" y1="{floor}" y2="{floor}"/>')
    for name, line in lines.items():
        points = [place(index, value) for index, value in enumerate(line)]
        dashes = ' stroke-dasharray="6 4"' if "p99" in name else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline stroke="{_COLOURS[name.split()[0]]}"{dashes} points="{path}"/>')
        parts.append(f'<text x="{points[-1][0] + 8:.1f}" y="{points[-1][1] + 4:.1f}">{escape(name)}</text>')
    parts.append(f'<text x="{LEFT + width}" y="{HEIGHT - 8}" text-anchor="end">{escape(across)}</text></svg>\n')
    return "\n".join(parts)
