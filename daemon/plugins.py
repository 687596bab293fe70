"""What the daemon is made of, under containerd's names for it, so that `ctr plugins ls` and clients find what they ask.

Wherry has no plugins that are loaded from elsewhere; a plugin here is a part that is built at start, timed and logged.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from wherry.core.errors import FailedPrecondition, WherryError
from wherry.core.platforms import Platform

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Plugin:
    """One part. `error` says why it isn't there; `requires` are types of others."""

    type: str
    id: str
    requires: Sequence[str] = ()
    platforms: Sequence[Platform] = ()
    exports: Mapping[str, str] = field(default_factory=dict)
    capabilities: Sequence[str] = ()
    error: WherryError | None = None

    @property
    def uri(self) -> str:
        """Its name in the configuration: `io.containerd.grpc.v1.tasks`."""
        return f"{self.type}.{self.id}"


class Plugins:
    """All parts, in the order in which they were built."""

    def __init__(self, disabled: Sequence[str] = (), required: Sequence[str] = ()) -> None:
        """Lists of URIs; a required plugin that is disabled or fails is an error of `check`."""
        self._disabled = frozenset(disabled)
        self._required = frozenset(required)
        self.all: list[Plugin] = []

    def enabled(self, type: str, id: str) -> bool:  # noqa: A002 -- containerd's names for the two
        """Whether the configuration lets a plugin be."""
        return f"{type}.{id}" not in self._disabled

    def any_disabled(self, uris: Iterable[str]) -> bool:
        """Whether the configuration turns off one of these, which are names of one part."""
        return not self._disabled.isdisjoint(uris)

    @contextlib.contextmanager
    def load(
        self,
        type: str,  # noqa: A002 -- containerd's names for the two
        id: str,  # noqa: A002
        *,
        requires: Sequence[str] = (),
        platforms: Sequence[Platform] = (),
        exports: Mapping[str, str] | None = None,
        capabilities: Sequence[str] = (),
        optional: bool = False,
    ) -> Iterator[Plugin]:
        """Build a part inside; it is logged with its time. An `optional` one's WherryError is kept, not raised."""
        plugin = Plugin(type, id, requires, platforms, exports or {}, capabilities)
        began = time.perf_counter()
        try:
            yield plugin
        except WherryError as error:
            if not optional:
                raise
            plugin.error = error
            log.warning("plugin not loaded", type=type, id=id, error=error.message)
        self.all.append(plugin)
        if plugin.error is None:
            log.info("plugin loaded", type=type, id=id, ms=round((time.perf_counter() - began) * 1000, 2))

    def check(self) -> None:
        """Raise FailedPrecondition where a required plugin isn't there; warn of a disabled one that is there."""
        for uri in sorted(self._disabled & {plugin.uri for plugin in self.all}):
            log.warning("plugin can't be disabled, it is loaded", uri=uri)
        there = {plugin.uri for plugin in self.all if plugin.error is None}
        if missing := sorted(self._required - there):
            raise FailedPrecondition(f"required plugins are not loaded: {', '.join(missing)}")
