"""The daemon's stores, assembled on a temporary folder, for tests that drive them directly."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import Message

from wherry.core.digest import Digest
from wherry.daemon.containers import ContainerService, ContainerStore
from wherry.daemon.content import ContentStore
from wherry.daemon.content_service import ContentService
from wherry.daemon.gc import Collector, Policy
from wherry.daemon.images import ImageService, ImageStore
from wherry.daemon.leases import LeaseService, LeaseStore
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import NamespaceService, NamespaceStore
from wherry.daemon.sandboxes import SandboxService, SandboxStore
from wherry.daemon.snapshots import SnapshotStore
from wherry.daemon.snapshots_service import SnapshotService
from wherry.proto import containers_pb2, images_pb2
from wherry.proto.service import GRPC_NAMESPACE, Context
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter

NS = "default"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# a collector that does nothing by itself
STILL = Policy(startup_delay=3600.0)


@dataclass
class Stores:
    """All stores over one database, and the events that they published."""

    root: Path
    metadata: Metadata
    namespaces: NamespaceStore
    content: ContentStore
    images: ImageStore
    containers: ContainerStore
    leases: LeaseStore
    sandboxes: SandboxStore
    snapshots: SnapshotStore
    collector: Collector
    events: list[tuple[str, str, Message]] = field(default_factory=list)

    @property
    def namespace_service(self) -> NamespaceService:
        return NamespaceService(self.namespaces)

    @property
    def content_service(self) -> ContentService:
        return ContentService(self.content)

    @property
    def image_service(self) -> ImageService:
        return ImageService(self.images, self.collector)

    @property
    def container_service(self) -> ContainerService:
        return ContainerService(self.containers)

    @property
    def lease_service(self) -> LeaseService:
        return LeaseService(self.leases, self.collector)

    @property
    def sandbox_service(self) -> SandboxService:
        return SandboxService(self.sandboxes)

    @property
    def snapshot_service(self) -> SnapshotService:
        return SnapshotService(self.snapshots)

    def blob(self, digest: str) -> Path:
        """Where a blob's file is."""
        return self.root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def topics(self) -> list[str]:
        """The topics of what was published so far."""
        return [topic for _, topic, _ in self.events]


@contextlib.asynccontextmanager
async def stores(root: Path, policy: Policy = STILL) -> AsyncIterator[Stores]:
    """The stores on `root`, as a daemon has them after its start; a second time: as after a restart."""
    events: list[tuple[str, str, Message]] = []

    def publish(namespace: str, topic: str, message: Message) -> None:
        events.append((namespace, topic, message))

    metadata = await Metadata.open(str(root / "metadata.db"))
    content = ContentStore(metadata, str(root / "content"), publish)
    snapshotters = {
        "overlayfs": OverlaySnapshotter(str(root / "snapshotter" / "overlayfs")),
        "native": NativeSnapshotter(str(root / "snapshotter" / "native")),
    }
    snapshots = SnapshotStore(metadata, snapshotters, publish)
    collector = Collector(metadata, content, snapshots, policy, publish)
    made = Stores(
        root=root,
        metadata=metadata,
        namespaces=NamespaceStore(metadata, publish),
        content=content,
        images=ImageStore(metadata, publish),
        containers=ContainerStore(metadata, publish),
        leases=LeaseStore(metadata),
        sandboxes=SandboxStore(metadata),
        snapshots=snapshots,
        collector=collector,
        events=events,
    )
    try:
        await collector.start()
        yield made
    finally:
        await collector.close()
        await content.close()
        await snapshots.close()
        await metadata.close()


def call(namespace: str | None = NS, lease: str | None = None) -> Context:
    """What a call brings that was made in this namespace, under this lease."""
    metadata = {}
    if namespace is not None:
        metadata[GRPC_NAMESPACE] = namespace
    if lease is not None:
        metadata["containerd-lease"] = lease
    return Context(metadata=metadata)


def digest_of(data: bytes) -> str:
    return str(Digest.of(data))


def image(name: str, digest: str, size: int = 7, **labels: str) -> images_pb2.Image:
    """An image whose labels are given with `_` for `.` and `/`… as a mapping where that isn't enough."""
    made = images_pb2.Image(name=name, labels=labels)
    made.target.digest = digest
    made.target.size = size
    made.target.media_type = MANIFEST
    return made


def container(id: str, **fields: object) -> containers_pb2.Container:  # noqa: A002
    """A container that passes the checks."""
    made = containers_pb2.Container(id=id, image="img", **fields)  # type: ignore[arg-type]
    made.runtime.name = made.runtime.name or "io.containerd.runc.v2"
    made.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
    made.spec.value = b"{}"
    return made


def killed(script: str, *args: str, lines: int) -> list[str]:
    """Run a script, SIGKILL it in the middle of its work after that many lines; all whole lines that it printed."""
    process = subprocess.Popen([sys.executable, "-c", script, *args], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as output:
        printed = [output.readline() for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        printed += output.readlines()
    process.wait()
    return [line.rstrip("\n") for line in printed if line.endswith("\n")]
