"""Who references whom: the graph that the garbage collector walks. Reads records, changes nothing.

The rules are containerd's (core/metadata/gc.go). Nodes belong to a namespace, and so do references: nothing of one
tenant keeps anything of another.

Roots: leases that haven't expired and what they hold; images that haven't expired; containers; content and snapshots
with the label `containerd.io/gc.root`; what sandboxes' labels reference; uploads that no lease holds, until they
expire; uploads that somebody writes to.

References: a container → its snapshot; a snapshot → its parent; an image → its target; an upload → the blob that it
stands for; and by labels on any of them `containerd.io/gc.ref.content[.x|/x]`, `gc.ref.image[.x|/x]`,
`gc.ref.snapshot.NAME[/x]`. `containerd.io/gc.bref.{container,content,image,snapshot.NAME}` on a thing has the other
reference it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from wherry.core.errors import InvalidArgument
from wherry.core.labels import GC_EXPIRE, GC_FLAT, GC_ROOT
from wherry.core.reference import parse_familiar
from wherry.proto import containers_pb2, content_pb2, images_pb2, leases_pb2, snapshots_pb2, types_pb2

CONTENT = "content"
SNAPSHOT = "snapshot"  # its key is SNAPSHOTTER/KEY
CONTAINER = "container"
IMAGE = "image"
LEASE = "lease"
INGEST = "ingest"
SANDBOX = "sandbox"

# what can be garbage; containers and sandboxes go only when somebody deletes them
COLLECTED = (SNAPSHOT, CONTENT, INGEST, IMAGE, LEASE)

_REF = "containerd.io/gc.ref."
_BREF = "containerd.io/gc.bref."
# characters of a digest that name a blob where no other begins with them
_SHORTEST = 4
# rows after which the thread lets others have the interpreter
_BREATH = 64


class Node(NamedTuple):
    """A thing in a namespace. `flat`: reached by a flat lease, so its labels' references don't count."""

    kind: str
    namespace: str
    key: str
    flat: bool = False


@dataclass(slots=True)
class Graph:
    """All things and their references, as one snapshot of the database has them.

    The text beside a node says how it is referenced, for `why`.
    """

    nodes: set[Node] = field(default_factory=set)
    roots: list[tuple[Node, str]] = field(default_factory=list)
    references: dict[Node, list[tuple[Node, str]]] = field(default_factory=dict)
    # references that a flat walk follows too: a snapshot's parent, an image's target
    structure: dict[Node, list[tuple[Node, str]]] = field(default_factory=dict)
    # seconds since the epoch at which the next of these expires; None: nothing does
    next_expiry: float | None = None

    def expires(self, moment: float) -> None:
        """Something that counts now counts until then."""
        self.next_expiry = moment if self.next_expiry is None else min(self.next_expiry, moment)

    def link(self, origin: Node, target: Node, how: str, *, structural: bool = False) -> None:
        """`origin` references `target`."""
        (self.structure if structural else self.references).setdefault(origin, []).append((target, how))

    def reached(self) -> dict[Node, tuple[Node | None, str]]:
        """All that is in use, each with what it was reached from (None for a root) and how."""
        seen: dict[Node, tuple[Node | None, str]] = {}
        # nearest first, so that `why` answers a shortest chain
        frontier: list[tuple[Node, Node | None, str]] = [(node, None, how) for node, how in self.roots]
        while frontier:
            following: list[tuple[Node, Node | None, str]] = []
            for node, origin, how in frontier:
                if node in seen:
                    continue
                seen[node] = (origin, how)
                plain = node._replace(flat=False)
                for target, label in self.structure.get(plain, ()):
                    following.append((target._replace(flat=node.flat), node, label))
                if not node.flat:
                    following += [(target, node, label) for target, label in self.references.get(plain, ())]
            frontier = following
        return seen

    def chains(self, target: Node) -> list[list[tuple[Node, str]]]:
        """The shortest chain from each root that keeps the thing, the shortest first: each node and how it is
        referenced by the one before, a root why it is one."""
        incoming = self._incoming()
        # from the thing upwards; each with the next one on the way down
        below: dict[Node, tuple[Node, str] | None] = {target: None, target._replace(flat=True): None}
        frontier = list(below)
        for node in frontier:  # it grows while it is walked: breadth first
            for origin, how in incoming.get(node, ()):
                if origin not in below:
                    below[origin] = (node, how)
                    frontier.append(origin)
        why: dict[Node, str] = {}
        for node, how in self.roots:
            why.setdefault(node, how)
        found = []
        for node in below:  # in the order in which they were found: the nearest first
            if node not in why:
                continue
            chain = [(node, why[node])]
            while (step := below[chain[-1][0]]) is not None:
                chain.append(step)
            found.append(chain)
        return found

    def _incoming(self) -> dict[Node, list[tuple[Node, str]]]:
        """All references turned round, of what is reached flat, too."""
        turned: dict[Node, list[tuple[Node, str]]] = {}
        for origin, links in self.structure.items():
            for target, how in links:
                for flat in (False, True):
                    turned.setdefault(target._replace(flat=flat), []).append((origin._replace(flat=flat), how))
        for origin, links in self.references.items():
            for target, how in links:
                turned.setdefault(target, []).append((origin, how))
        return turned

    def find(self, namespace: str, ref: str) -> list[Node]:
        """The things of a namespace that `ref` may mean: by their key, a digest also by its beginning, an image also by
        its familiar name, a snapshot also without its snapshotter."""
        names = {ref}
        with contextlib.suppress(InvalidArgument):
            names.add(str(parse_familiar(ref)))
        digest = ref.removeprefix("sha256:")
        short = len(digest) >= _SHORTEST and set(digest) <= set("0123456789abcdef")
        found = []
        for node in self.nodes:
            if node.namespace != namespace:
                continue
            key = node.key
            if (
                key == ref
                or (node.kind == IMAGE and key in names)
                or (node.kind == SNAPSHOT and key.partition("/")[2] == ref)
                or (short and node.kind == CONTENT and key.startswith(f"sha256:{digest}"))
            ):
                found.append(node)
        return sorted(found)

    def garbage(self) -> list[Node]:
        """What nothing keeps."""
        used = {node._replace(flat=False) for node in self.reached()}
        return [node for node in self.nodes if node.kind in COLLECTED and node not in used]


def build(connection: sqlite3.Connection, writing: Iterable[tuple[str, str]] = ()) -> Graph:
    """The graph of everything. `writing`: (namespace, ref) of the uploads that somebody writes to."""
    graph = Graph()
    moment = datetime.now(UTC)
    for load in (_leases, _images, _content, _containers, _snapshots):
        load(connection, graph, moment)
    _sandboxes(connection, graph)
    _ingests(connection, graph, set(writing))
    return graph


def _rows(connection: sqlite3.Connection, query: str) -> Iterator[tuple[str, ...]]:
    for number, row in enumerate(connection.execute(query).fetchall()):
        if number % _BREATH == _BREATH - 1:
            # a start of a container must not wait for the interpreter's switch interval (5 ms) again and again
            time.sleep(0)
        yield row


def _leases(connection: sqlite3.Connection, graph: Graph, moment: datetime) -> None:
    flat: dict[tuple[str, str], bool] = {}
    for namespace, id_, record in _rows(connection, "SELECT namespace, id, record FROM leases"):
        labels = leases_pb2.Lease.FromString(record).labels  # type: ignore[arg-type]
        node = Node(LEASE, namespace, id_)
        graph.nodes.add(node)
        expiry = expiry_of(labels)
        if expiry is None or expiry >= moment:
            flat[namespace, id_] = GC_FLAT in labels
            graph.roots.append((node, "a lease that hasn't expired"))
            if expiry is not None:
                graph.expires(expiry.timestamp())
    kinds = {"content": CONTENT, "ingests": INGEST, "images": IMAGE}
    for namespace, lease, type_, id_ in _rows(connection, "SELECT namespace, lease, type, id FROM lease_resources"):
        if (namespace, lease) not in flat:
            continue
        kind, _, snapshotter = type_.partition("/")
        target = (
            Node(SNAPSHOT, namespace, f"{snapshotter}/{id_}", flat[namespace, lease])
            if snapshotter
            else Node(kinds.get(kind, kind), namespace, id_, flat[namespace, lease] and kind != "ingests")
        )
        graph.link(Node(LEASE, namespace, lease), target, "held by the lease")


def _images(connection: sqlite3.Connection, graph: Graph, moment: datetime) -> None:
    for namespace, name, record in _rows(connection, "SELECT namespace, name, record FROM images"):
        image = images_pb2.Image.FromString(record)  # type: ignore[arg-type]
        node = Node(IMAGE, namespace, name)
        graph.nodes.add(node)
        expiry = expiry_of(image.labels)
        if expiry is None or expiry >= moment:
            graph.roots.append((node, "an image"))
            if expiry is not None:
                graph.expires(expiry.timestamp())
        graph.link(node, Node(CONTENT, namespace, image.target.digest), "the image's target", structural=True)
        _labels(graph, node, image.labels)


def _content(connection: sqlite3.Connection, graph: Graph, moment: datetime) -> None:
    for namespace, digest, record in _rows(connection, "SELECT namespace, digest, record FROM blobs"):
        node = Node(CONTENT, namespace, digest)
        graph.nodes.add(node)
        _labels(graph, node, content_pb2.Info.FromString(record).labels, rooted=True)  # type: ignore[arg-type]


def _containers(connection: sqlite3.Connection, graph: Graph, moment: datetime) -> None:
    for namespace, id_, record in _rows(connection, "SELECT namespace, id, record FROM containers"):
        container = containers_pb2.Container.FromString(record)  # type: ignore[arg-type]
        node = Node(CONTAINER, namespace, id_)
        graph.nodes.add(node)
        graph.roots.append((node, "a container"))
        if container.snapshotter:
            snapshot = Node(SNAPSHOT, namespace, f"{container.snapshotter}/{container.snapshot_key}")
            graph.link(node, snapshot, "the container's root")
        _labels(graph, node, container.labels)


def _snapshots(connection: sqlite3.Connection, graph: Graph, moment: datetime) -> None:
    # what is being committed (origin) is neither garbage nor a reference yet; its key is there and holds the parent
    query = "SELECT namespace, snapshotter, key, parent, record FROM snapshots WHERE origin = ''"
    for namespace, snapshotter, key, parent, record in _rows(connection, query):
        node = Node(SNAPSHOT, namespace, f"{snapshotter}/{key}")
        graph.nodes.add(node)
        if parent:
            graph.link(node, Node(SNAPSHOT, namespace, f"{snapshotter}/{parent}"), "its parent", structural=True)
        labels = snapshots_pb2.Info.FromString(record).labels  # type: ignore[arg-type]
        _labels(graph, node, labels, rooted=True)
    query = "SELECT namespace, snapshotter, key, origin FROM snapshots WHERE origin <> ''"
    for namespace, snapshotter, key, origin in _rows(connection, query):
        # whoever holds the new name holds the key until the commit is done, and the commit itself holds it
        old = Node(SNAPSHOT, namespace, f"{snapshotter}/{origin}")
        graph.roots.append((old, f"being committed as {key}"))


def _sandboxes(connection: sqlite3.Connection, graph: Graph) -> None:
    for namespace, id_, record in _rows(connection, "SELECT namespace, id, record FROM sandboxes"):
        node = Node(SANDBOX, namespace, id_)
        graph.nodes.add(node)
        graph.roots.append((node, "a sandbox"))
        _labels(graph, node, types_pb2.Sandbox.FromString(record).labels)  # type: ignore[arg-type]


def _ingests(connection: sqlite3.Connection, graph: Graph, writing: set[tuple[str, str]]) -> None:
    now = time.time_ns()
    for namespace, ref, shared, expires in _rows(connection, "SELECT namespace, ref, shared, expires FROM ingests"):
        node = Node(INGEST, namespace, ref)
        graph.nodes.add(node)
        if (namespace, ref) in writing:
            graph.roots.append((node, "an upload that goes on"))
        elif expires is not None and int(expires) > now:
            graph.roots.append((node, "an upload that hasn't expired"))
            graph.expires(int(expires) / 1e9)
        if shared:
            graph.link(node, Node(CONTENT, namespace, shared), "the blob that the upload stands for")


def _labels(graph: Graph, node: Node, labels: Mapping[str, str], *, rooted: bool = False) -> None:
    """The references by labels of one thing; `rooted`: it may say that it is a root."""
    for key, value in labels.items():
        if not key.startswith("containerd.io/gc."):
            continue
        if rooted and key.startswith(GC_ROOT):
            graph.roots.append((node, f"label {key}"))
        elif key.startswith(_REF):
            target = _target(node.namespace, key.removeprefix(_REF), value, _REFERENCED)
            if target is not None:
                graph.link(node, target, f"label {key}")
        elif key.startswith(_BREF):
            origin = _target(node.namespace, key.removeprefix(_BREF), value, _REFERRERS)
            if origin is not None:
                graph.link(origin, node, f"label {key} on what is referenced")


_REFERENCED = {"content": CONTENT, "image": IMAGE}
_REFERRERS = {**_REFERENCED, "container": CONTAINER}


def _target(namespace: str, rest: str, value: str, kinds: Mapping[str, str]) -> Node | None:
    """What a label names: `rest` is its key behind `gc.ref.` or `gc.bref.`; None for one that means nothing."""
    if rest.startswith("snapshot."):
        snapshotter = rest.removeprefix("snapshot.").partition("/")[0]
        return Node(SNAPSHOT, namespace, f"{snapshotter}/{value}")
    for word, kind in kinds.items():
        # `content`, `content.NAME`, `content/NAME`, but not `contents`
        if rest == word or (rest.startswith(word) and rest[len(word)] in "./"):
            return Node(kind, namespace, value)
    return None


def expiry_of(labels: Mapping[str, str]) -> datetime | None:
    """The time in the label `containerd.io/gc.expire`; None without one, or where it is no time (RFC 3339)."""
    text = labels.get(GC_EXPIRE)
    if text is None:
        return None
    try:
        expiry = datetime.fromisoformat(text)
    except ValueError:
        return None
    # RFC 3339 demands a zone; without one it is no time
    return expiry if expiry.tzinfo is not None else None
