"""The garbage collector, where the daemon is wherryd: what would go, what went, and why a thing is kept."""

from __future__ import annotations

from wherry.client.transport import Calls
from wherry.core.tuples import NamedTuple
from wherry.proto import wherry_gc_pb2 as pb

_SERVICE = "wherry.gc.v1.Gc"


class Thing(NamedTuple):
    """`kind` is content, snapshot, image, container, lease, ingest or sandbox; a snapshot's key is SNAPSHOTTER/KEY;
    `size` in bytes, 0 where nobody knows it."""

    namespace: str
    kind: str
    key: str
    size: int = 0


class Link(NamedTuple):
    """A step of a chain: why the first is a root, how each other one is referenced by the one before."""

    thing: Thing
    how: str


class Explanation(NamedTuple):
    """A thing with the shortest chain from each root that keeps it; no chain: nothing does. `more` chains were left
    out."""

    thing: Thing
    chains: tuple[tuple[Link, ...], ...]
    more: int = 0


class Collected(NamedTuple):
    """What went, and the seconds that it took."""

    things: tuple[Thing, ...]
    seconds: float


class Gc:
    """The collector of all namespaces; `explain` speaks of this one's things."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Collects and waits until the files are gone; with `dry_run` only says what would go. Raises Unimplemented
        where the daemon isn't wherryd."""
        request = pb.CollectRequest(dry_run=dry_run)
        answer = await self._calls.unary(f"{_SERVICE}/Collect", request, pb.CollectResponse)
        return Collected(tuple(map(_thing, answer.things)), answer.took.ToNanoseconds() / 1e9)

    async def explain(self, ref: str) -> list[Explanation]:
        """Why what `ref` names is kept; raises NotFound."""
        answer = await self._calls.unary(f"{_SERVICE}/Explain", pb.ExplainRequest(ref=ref), pb.ExplainResponse)
        return [
            Explanation(
                _thing(each.thing),
                tuple(tuple(Link(_thing(link.thing), link.how) for link in chain.links) for chain in each.chains),
                each.more,
            )
            for each in answer.explanations
        ]


def _thing(message: pb.Thing) -> Thing:
    return Thing(message.namespace, message.kind, message.key, message.size)
