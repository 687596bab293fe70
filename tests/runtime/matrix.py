"""The table of docs/runtime.md: what holds for which runtime, as the tests have just seen it.

WHERRY_MATRIX=docs/runtime.md pytest tests/runtime

A run of some of the files writes their rows anew and leaves the others.
"""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- matrix: made by tests/runtime/matrix.py -->", "<!-- end of the matrix -->"
RUNTIMES = ("wherry-runtime", "runc", "crun")


class Matrix:
    """Outcomes by test and runtime. `ours` marks tests that the references can't take part in."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, str]] = {}

    def add(self, module: str, name: str, runtime: str, outcome: str) -> None:
        """outcome: `holds`, `fails` or the reason for which a test was left out; the worst one of a test stays."""
        row = self._seen.setdefault(f"{module}: {_words(name)}", {})
        if row.get(runtime, "holds") == "holds":
            row[runtime] = outcome

    def read(self, table: str) -> None:
        """Take over the rows of a table whose modules weren't run."""
        ran = {name.partition(":")[0] for name in self._seen}
        for line in table.splitlines():
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if ":" in name and len(cells) == len(RUNTIMES) and name.partition(":")[0] not in ran:
                self._seen[name] = dict(zip(RUNTIMES, cells, strict=True))

    def table(self) -> str:
        lines = [f"| what the test shows | {' | '.join(RUNTIMES)} |", "|---|---|---|---|"]
        for name in sorted(self._seen):
            row = self._seen[name]
            lines.append(f"| {name} | {' | '.join(row.get(runtime, '-') for runtime in RUNTIMES)} |")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Replace what stands between the marks."""
        before, _, rest = path.read_text().partition(BEGIN)
        old, _, after = rest.partition(END)
        self.read(old)
        path.write_text(f"{before}{BEGIN}\n{self.table()}\n{END}{after}")


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")
