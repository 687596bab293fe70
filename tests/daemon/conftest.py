"""Fixtures of the daemon's tests."""

from tests.wherryd import wherryd

__all__ = ["wherryd"]
