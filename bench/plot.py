"""A line over time as SVG, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 800, 300, 60, 40, 40
_STYLE = (
    "text{font:12px sans-serif;fill:#444}.line{fill:none;stroke:#0a66c2;stroke-width:1.5}"
    ".axis{stroke:#888;stroke-width:1}.grid{stroke:#8884;stroke-width:1}.mark{stroke:#c33;stroke-width:.6;opacity:.6}"
    "@media(prefers-color-scheme:dark){text{fill:#ccc}.line{stroke:#6db3ff}}"
)


def draw(points: Sequence[tuple[float, float]], marks: Sequence[float], title: str, across: str, up: str) -> str:
    """The picture of `points` (x, y); `marks` are vertical lines; `across` and `up` are the axes' units."""
    most_x = max((x for x, _ in points), default=1.0) or 1.0
    step_y = _step(max((y for _, y in points), default=1.0) or 1.0)
    most_y = step_y * math.ceil(max((y for _, y in points), default=1.0) / step_y + 0.1)
    step_x = _step(most_x)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + x / most_x * (WIDTH - LEFT - 20),
            HEIGHT - BOTTOM - y / most_y * (HEIGHT - BOTTOM - TOP),
        )

    floor = HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="22">{escape(title)}</text>',
    ]
    for number in range(1 + int(most_y / step_y + 1e-9)):
        _, y = place(0, number * step_y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number * step_y:g}</text>')
    for number in range(1 + int(most_x / step_x + 1e-9)):
        x, _ = place(number * step_x, 0)
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{number * step_x:g}</text>')
    for at in marks:
        x, _ = place(at, 0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 20}" y1="{floor}" y2="{floor}"/>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline class="line" points="{line}"/>')
    parts.append(f'<text x="{WIDTH - 20}" y="{HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text x="8" y="{TOP - 4}">{escape(up)}</text></svg>\n')
    return "\n".join(parts)


def _step(most: float) -> float:
    """A round distance between lines, so that there are four to ten of them."""
    size = 10.0 ** math.floor(math.log10(most))
    for factor in (0.1, 0.2, 0.5, 1.0):
        if most / (size * factor) <= 10:
            return size * factor
    return size
