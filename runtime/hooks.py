"""Hooks: programs that the configuration runs at six moments of a container's life (config.md, POSIX-platform Hooks).

Most containers have none, so what runs them (`hook_process`) is loaded where there are some: before the fork, because a
container's own files offer nothing to import.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

KINDS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def of(spec: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return (spec.get("hooks") or {}).get(kind) or []


def run(spec: dict[str, Any], kind: str, state: dict[str, Any]) -> None:
    """Run the hooks of a kind; ContainerError if one fails."""
    wanted = of(spec, kind)
    if wanted:
        from wherry.runtime import hook_process

        hook_process.run_all(kind, wanted, state)


def preload(spec: dict[str, Any]) -> None:
    if any(of(spec, kind) for kind in KINDS):
        from wherry.runtime import hook_process  # noqa: F401
