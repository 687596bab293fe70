"""Walks a shim's ways before the fork server freezes."""

from __future__ import annotations


def walk() -> None:
    """Nothing yet."""
