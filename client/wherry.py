"""The client for programs: a daemon, images, containers and sandboxes, with nothing left behind.

    async with Wherry() as wherry:
        image = await wherry.pull("alpine")
        async with wherry.run(image, ["sh", "-c", "echo hello; exit 3"]) as container:
            async for line in container.stdout:
                print(line.decode(), end="")
            print((await container.wait()).status)

`Wherry` keeps nothing between calls but its connection, and what it made and hasn't removed yet: sandboxes, an embedded
daemon, the keeper. All of it ends with the block. Every call raises kinds of `wherry.core.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from wherry.client.archive import load as load_archive
from wherry.client.embedded import Embedded
from wherry.client.guest import Guest
from wherry.client.keepers import Keeper
from wherry.client.launch import Launch
from wherry.client.manifests import picture
from wherry.client.programs import Program, run
from wherry.client.sandbox import Limits, Plan, Sandbox, make
from wherry.client.spec import SpecOptions
from wherry.client.transfer import Progress, Registry
from wherry.client.unpack import unpack
from wherry.core.errors import FailedPrecondition, NotFound, OutOfRange, Unavailable, Unimplemented
from wherry.core.platforms import host
from wherry.core.reference import parse_familiar

if TYPE_CHECKING:
    from types import TracebackType

    from wherry.client.api import Client
    from wherry.client.events import Event
    from wherry.client.images import Image
    from wherry.client.tasks import Exit
    from wherry.core.platforms import Platform

# seconds between two tries to reach a daemon that went away, and for which it may be away
RETRY, PATIENCE = 0.2, 10.0


class Container(Guest):
    """A container that `Wherry.run` started: its first process has streams of ours."""

    def __init__(self, client: Client, program: Program) -> None:
        super().__init__(client, program.container)
        self.program = program

    @property
    def stdout(self) -> asyncio.StreamReader:
        """What it writes: `async for line in container.stdout`, or `read`. The end comes when it closes it."""
        return self.program.stdout

    @property
    def stderr(self) -> asyncio.StreamReader:
        """Its errors; nothing with a terminal, which has one stream."""
        return self.program.stderr

    async def wait(self, timeout: float | None = None) -> Exit:  # noqa: ASYNC109 - the process isn't hurt by it
        """How it ended; raises TimeoutError where it runs on after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            return await self.program.wait()

    async def send(self, data: bytes) -> None:
        """Gives it input; waits while it doesn't read."""
        await self.program.write(data)

    async def close_stdin(self) -> None:
        """Ends its input."""
        await self.program.close_stdin()

    async def kill(self, signal: int = 15) -> None:
        """Sends a signal to its first process; raises NotFound when that has ended."""
        await self.program.kill(signal)


class Wherry:
    """A daemon as programs use it: `async with Wherry() as wherry`."""

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str | None = None,
        embedded: bool = False,
        root: str = "",
        state: str = "",
        timeout: float | None = None,
        patience: float = PATIENCE,
        sandboxes: str = "",
    ) -> None:
        """`address` is the socket of `wherryd` or containerd; it and `namespace` come from the environment where they
        aren't given. With `embedded` a `wherryd` is started, on folders `root` and `state`, and stopped at the end.
        `timeout` is the limit of each call in seconds, `patience` how long a daemon may be away (see
        `wherry.client.patience`), `sandboxes` a folder for what belongs to sandboxes.
        """
        self._address = address
        self._namespace = namespace
        self._timeout = timeout
        self._patience = patience
        self._sandboxes = sandboxes
        self._embedded = Embedded(root=root, state=state, address=address or "") if embedded else None
        self._client: Client | None = None
        self._keeper: Keeper | None = None
        self._open: set[Sandbox] = set()

    @property
    def client(self) -> Client:
        """The services of the API, one by one. Raises FailedPrecondition outside of `async with`."""
        if self._client is None:
            raise FailedPrecondition("not connected: use `async with Wherry() as wherry`")
        return self._client

    async def __aenter__(self) -> Self:
        from wherry.client.address import connect, default_address

        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.start)
            self._address = self._embedded.address
        self._address = self._address or default_address()
        try:
            self._client = await connect(
                self._address, namespace=self._namespace, timeout=self._timeout, patience=self._patience
            )
        except BaseException:
            if self._embedded is not None:
                await asyncio.to_thread(self._embedded.stop)
            raise
        self._keeper = Keeper(self._address, self._sandboxes)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._end())

    async def _end(self) -> None:
        done = await asyncio.gather(*(box.close() for box in list(self._open)), return_exceptions=True)
        self._open.clear()
        if self._keeper is not None:
            await self._keeper.close()
        if self._client is not None:
            await self._client.close()
        if self._embedded is not None:
            await asyncio.to_thread(self._embedded.stop)
        for result in done:
            if isinstance(result, BaseException):
                raise result

    async def pull(
        self,
        reference: str,
        *,
        platform: Platform | None = None,
        plain_http: bool = False,
        user: str = "",
        progress: Callable[[Progress], None] | None = None,
    ) -> Image:
        """Brings an image from its registry, unpacked; `alpine` is `docker.io/library/alpine:latest`.

        `user` is `name:password`; `progress` is called as it goes. Raises NotFound, Unauthenticated, Unavailable …
        """
        name = str(parse_familiar(reference))
        registry = Registry(name, user=user, scheme="http" if plain_http else "")
        wanted = platform or host()
        snapshotter = await self.client.namespaces.default_snapshotter()
        async for step in self.client.transfer.pull(registry, platforms=[wanted], unpack=[(wanted, snapshotter)]):
            if progress is not None:
                progress(step)
        return await self.client.images.get(name)

    async def image(self, reference: str, *, plain_http: bool = False) -> Image:
        """An image that is there, or is pulled now."""
        try:
            return await self.client.images.find(reference)
        except NotFound:
            return await self.pull(reference, plain_http=plain_http)

    async def load(self, archive: str) -> list[Image]:
        """The images of an archive (`docker save`, an OCI layout in a tar), unpacked."""
        snapshotter = await self.client.namespaces.default_snapshotter()
        # the file is read by threads, piece by piece
        file = await asyncio.to_thread(open, archive, "rb")
        try:
            images = await load_archive(self.client, file)
        finally:
            file.close()
        for image in images:
            await unpack(self.client, await picture(self.client.content, image.target), snapshotter)
        return images

    @asynccontextmanager
    async def run(
        self,
        image: Image | str,
        args: Sequence[str] = (),
        *,
        name: str = "",
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: str = "",
        user: str | None = None,
        memory: int = 0,
        cpus: float = 0.0,
        pids: int = 0,
        tty: bool = False,
        labels: Mapping[str, str] = MappingProxyType({}),
        mounts: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> AsyncIterator[Container]:
        """A container for the time of the block; afterwards nothing is left of it, whatever happened.

        `args` replaces the image's command. `memory` is in bytes, `cpus` in whole CPUs; `options` are further fields
        of `SpecOptions` (`read_only`, `hostname`, `net_host`, `seccomp` …). An image that isn't there is pulled.
        """
        found = await self.image(image) if isinstance(image, str) else image
        spec = SpecOptions(
            args=args,
            env=[f"{key}={value}" for key, value in env.items()],
            cwd=cwd,
            memory=memory,
            cpus=cpus,
            pids=pids,
            tty=tty,
            mounts=mounts,
            **options,
        )
        launch = Launch(id=name or f"run-{os.urandom(8).hex()}", image=found.name, spec=spec, user=user, labels=labels)
        async with run(self.client, launch) as program:
            yield Container(self.client, program)

    def sandbox(
        self,
        image: Image | str,
        *,
        memory: int = 0,
        cpus: float = 0.0,
        pids: int = 0,
        disk: int = 0,
        ttl: float = 0.0,
        disk_kind: str = "",
        env: Mapping[str, str] = MappingProxyType({}),
        cwd: str = "",
        user: str | None = None,
        hostname: str = "",
        mounts: Sequence[Mapping[str, Any]] = (),
        read_only: bool = False,
        seccomp: bool = True,
        net_host: bool = False,
    ) -> Starting:
        """What is needed to run code that nobody trusts: `async with wherry.sandbox(…) as box`, or `await` it.

        Without a network, under the default seccomp profile; limits are in bytes, whole CPUs, processes, bytes on disk
        and seconds of life (`Limits`), and none where they are 0. It is removed with the block, with this `Wherry`,
        when its time is up, and when this process dies, however it does.
        """
        limits = Limits(memory, cpus, pids, disk, ttl, disk_kind)
        return Starting(self, image, Plan("", limits, env, cwd, user, hostname, mounts, read_only, seccomp, net_host))

    async def start(self, image: Image | str, plan: Plan) -> Sandbox:
        """A sandbox by a plan of one's own."""
        found = await self.image(image) if isinstance(image, str) else image
        if self._keeper is None:
            raise FailedPrecondition("not connected: use `async with Wherry() as wherry`")
        sandbox = await make(self.client, plan._replace(image=found.name), self._keeper)
        self.adopt(sandbox)
        return sandbox

    def adopt(self, *sandboxes: Sandbox) -> None:
        """Closes these sandboxes with this `Wherry`."""
        for sandbox in sandboxes:
            self._open.add(sandbox)
            sandbox.adopt, sandbox.disown = self.adopt, self._open.discard

    async def events(self, filters: Iterable[str] = ()) -> AsyncIterator[Event]:
        """What happens from now on. A daemon that goes away is subscribed to again when it is back: `wherryd` goes on
        where it was, so that nothing is missed (containerd keeps no events; what happened meanwhile is)."""
        place: int | None = None
        while True:
            with contextlib.suppress(Unavailable):
                try:
                    if place is None:
                        kept = await self.client.events.kept()
                        place = max(kept.newest, kept.resume_from)
                    async for event in self.client.events.follow(filters, after=place):
                        place = event.sequence
                        yield event
                except OutOfRange:
                    place = None  # it was away for longer than events are kept
                except Unimplemented:
                    async for event in self.client.events.subscribe(filters):
                        yield event
            await asyncio.sleep(RETRY)


class Starting:
    """A sandbox that isn't there yet: for `async with`, or `await`."""

    def __init__(self, wherry: Wherry, image: Image | str, plan: Plan) -> None:
        self._wherry, self._image, self._plan = wherry, image, plan
        self._sandbox: Sandbox | None = None

    def __await__(self) -> Generator[Any, None, Sandbox]:
        return self._wherry.start(self._image, self._plan).__await__()

    async def __aenter__(self) -> Sandbox:
        self._sandbox = await self
        return self._sandbox

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sandbox is not None:
            await self._sandbox.close()
