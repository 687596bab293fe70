"""The garbage collector to clients: `wherry.gc.v1`, an addition beside containerd's API."""

from __future__ import annotations

from collections.abc import Iterable

from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.names import quote
from wherry.daemon.content import ContentStore
from wherry.daemon.gc import Collector
from wherry.daemon.gc_graph import CONTENT, SNAPSHOT, Node
from wherry.daemon.namespaces import require_namespace
from wherry.daemon.snapshots import SnapshotStore
from wherry.proto import wherry_gc_pb2 as pb
from wherry.proto.service import Context

CHAINS = 20
"""Chains that one explanation shows: a base layer may be kept by a thousand images."""


class GcService:
    """wherry.gc.v1.Gc."""

    SERVICE = "wherry.gc.v1.Gc"

    def __init__(self, collector: Collector, content: ContentStore, snapshots: SnapshotStore) -> None:
        self._collector = collector
        self._content = content
        self._snapshots = snapshots

    async def collect(self, request: pb.CollectRequest, context: Context) -> pb.CollectResponse:
        """What went, or would go, of all namespaces."""
        garbage = await self._collector.garbage()
        sizes = {node: await self._size(node) for node in garbage}
        response = pb.CollectResponse()
        gone: Iterable[Node] = garbage
        if not request.dry_run:
            stats = await self._collector.collect_all()
            gone = stats.things
            response.took.FromNanoseconds(int(stats.seconds * 1e9))
        response.things.extend(_thing(node, sizes.get(node, 0)) for node in sorted(gone))
        return response

    async def explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """Raises NotFound where nothing has that name."""
        namespace = require_namespace(context)
        if not request.ref:
            raise InvalidArgument("explain what: the name is empty: invalid argument")
        graph = await self._collector.graph()
        found = graph.find(namespace, request.ref)
        if not found:
            raise NotFound(f"{quote(request.ref)} in namespace {quote(namespace)}: not found")
        response = pb.ExplainResponse()
        for node in found:
            chains = graph.chains(node)
            explanation = response.explanations.add(
                thing=_thing(node, await self._size(node)), more=max(0, len(chains) - CHAINS)
            )
            for chain in chains[:CHAINS]:
                links = (pb.Link(thing=_thing(each), how=how) for each, how in chain)
                explanation.chains.add(links=links)
        return response

    async def _size(self, node: Node) -> int:
        """Bytes on disk of content and of committed snapshots; 0 where nobody knows."""
        try:
            if node.kind == CONTENT:
                return self._content.info(node.namespace, Digest.parse(node.key)).size
            if node.kind == SNAPSHOT:
                snapshotter, _, key = node.key.partition("/")
                return (await self._snapshots.usage(node.namespace, snapshotter, key))[0]
        except WherryError:
            pass  # it went meanwhile, or its snapshotter isn't there
        return 0


def _thing(node: Node, size: int = 0) -> pb.Thing:
    return pb.Thing(namespace=node.namespace, kind=node.kind, key=node.key, size=size)
