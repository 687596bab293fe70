"""The runtime's side of CNI: chains of plugins, results handed on, results kept. Spec 1.1, sections 2 to 5."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.names import quote
from wherry.network.cni import config as configurations
from wherry.network.cni.cache import Attachment, Cache, Cached
from wherry.network.cni.config import VERSIONS, NetworkList
from wherry.network.cni.plugin import PluginError, execute
from wherry.network.cni.result import Result, parse

CONF_DIR = "/etc/cni/net.d"
BIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni")
CACHE_DIR = "/var/lib/cni"
TIMEOUT = 60.0
"""Seconds for one plugin's command."""
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_INTERFACE = re.compile(r"[^/:\s]{1,15}")


class Cni:
    """Networks of a folder, run with the plugins of others.

    Errors: NotFound for a network or a plugin that isn't there, InvalidArgument for a wrong configuration or
    attachment, PluginError for what a plugin refuses, DeadlineExceeded.
    """

    def __init__(
        self,
        conf_dir: str = CONF_DIR,
        bin_dirs: Sequence[str] = BIN_DIRS,
        cache_dir: str = CACHE_DIR,
        timeout: float = TIMEOUT,
        within: Sequence[str] = (),
    ) -> None:
        """`within` is a command that runs a plugin somewhere else, the plugin's path behind it."""
        self._within = list(within)
        self._conf_dir = conf_dir
        self._bin_dirs = list(bin_dirs)
        self._cache = Cache(cache_dir)
        self._timeout = timeout
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    # -- configurations

    @property
    def conf_dir(self) -> str:
        """The folder of the configurations."""
        return self._conf_dir

    def networks(self) -> tuple[list[NetworkList], list[str]]:
        """The networks of the folder, and what is wrong with files of it."""
        return configurations.load_all(self._conf_dir)

    def load(self, name: str) -> NetworkList:
        """A network by its name. Raises NotFound."""
        return configurations.load(self._conf_dir, name)

    def attachments(self) -> list[Cached]:
        """What was added and not deleted yet, by this process or one before it."""
        return self._cache.all()

    # -- commands

    async def add(self, network: NetworkList, attachment: Attachment) -> Result:
        """Attach a container; where a plugin refuses, what others did is taken back."""
        _check(attachment)
        if not attachment.netns:
            raise InvalidArgument("a container is attached by its network namespace, none is given: invalid argument")
        async with self._alone(attachment):
            self._cache.write(network, attachment, None)
            result: Mapping[str, Any] | None = None
            try:
                for plugin in network.plugins:
                    answer = await self._run("ADD", network, plugin, attachment, result)
                    result = answer or result
                parsed = parse(result or {"cniVersion": network.version})
                self._cache.write(network, attachment, parsed.raw)
            except BaseException as error:
                await asyncio.shield(self._take_back(network, attachment, result, error))
                raise
            return parsed

    async def check(self, network: str, attachment: Attachment) -> None:
        """Whether an attachment is still as it was made: raises what a plugin finds wrong.

        Raises NotFound where there is none. Nothing happens where the network's version has no CHECK (before 0.4.0),
        or its configuration forbids it.
        """
        async with self._alone(attachment):
            kept = self._kept(network, attachment)
            if kept.network.disable_check or not kept.network.at_least("0.4.0"):
                return
            for plugin in kept.network.plugins:
                await self._run("CHECK", kept.network, plugin, _merged(kept.attachment, attachment), kept.result)

    async def delete(self, network: NetworkList | str, attachment: Attachment) -> None:
        """Detach a container, with the configuration with which it was attached; last plugin first.

        Every plugin is asked, also where one before it fails. One that was never attached, or is detached already, is
        fine. Raises an ExceptionGroup's worth in one PluginError (the first; the others are its notes); then what is
        kept of it stays, for the next try.
        """
        _check(attachment)
        name = network if isinstance(network, str) else network.name
        async with self._alone(attachment):
            kept = self._cache.read(name, attachment)
            if kept is None:
                if isinstance(network, str):
                    return
                kept = Cached(network, attachment, {}, "")
            errors = await self._delete(kept.network, _merged(kept.attachment, attachment), kept.result)
            if errors:
                for other in errors[1:]:
                    errors[0].add_note(other.message)
                raise errors[0]
            self._cache.remove(name, attachment)

    async def gc(self, network: NetworkList, valid: Iterable[Attachment]) -> None:
        """Clean up after attachments that aren't among the `valid` ones: DEL for those that are known here, then GC.

        GC is of version 1.1; raises what plugins couldn't do, after all were asked.
        """
        stay = {(item.container, item.interface) for item in valid}
        errors: list[WherryError] = []
        for kept in self._cache.all():
            key = kept.attachment.container, kept.attachment.interface
            if kept.network.name == network.name and key not in stay:
                try:
                    await self.delete(network.name, kept.attachment)
                except WherryError as error:
                    errors.append(error)
        if network.at_least("1.1.0") and not network.disable_gc:
            listed = [{"containerID": container, "ifname": interface} for container, interface in sorted(stay)]
            for plugin in network.plugins:
                more = {"cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}
                try:
                    await self._execute("GC", network, {**plugin, **more}, {})
                except WherryError as error:
                    errors.append(error)
        if errors:
            for other in errors[1:]:
                errors[0].add_note(other.message)
            raise errors[0]

    async def status(self, network: NetworkList) -> None:
        """Whether a network is ready for an ADD; raises what a plugin says is missing. Before 1.1 it always is."""
        if network.at_least("1.1.0"):
            for plugin in network.plugins:
                await self._execute("STATUS", network, plugin, {})

    async def version(self, kind: str) -> list[str]:
        """The versions that a plugin speaks."""
        answer = await execute(
            kind,
            self._bin_dirs,
            "VERSION",
            {"cniVersion": VERSIONS[-1]},
            variables={"CNI_NETNS": "dummy"},
            seconds=self._timeout,
        )
        return [str(item) for item in answer.get("supportedVersions") or ["0.1.0"]]

    async def validate(self, network: NetworkList) -> None:
        """Whether every plugin is there and speaks the network's version. Raises NotFound, InvalidArgument."""
        for plugin in network.plugins:
            spoken = await self.version(plugin["type"])
            if network.version not in spoken:
                raise InvalidArgument(
                    f"CNI plugin {plugin['type']} speaks {', '.join(spoken)}, network {quote(network.name)} asks for "
                    f"{network.version}: invalid argument"
                )

    # -- helpers

    async def _take_back(
        self, network: NetworkList, attachment: Attachment, result: Mapping[str, Any] | None, error: BaseException
    ) -> None:
        """DEL after an ADD that failed, so that the network is as before (spec, section 4: ADD)."""
        failed = await self._delete(network, attachment, result or {})
        for other in failed:
            error.add_note(f"taking it back: {other.message}")
        if not failed:
            self._cache.remove(network.name, attachment)

    async def _delete(
        self, network: NetworkList, attachment: Attachment, result: Mapping[str, Any]
    ) -> list[WherryError]:
        errors: list[WherryError] = []
        previous = result if network.at_least("0.4.0") and result else None
        for plugin in reversed(network.plugins):
            try:
                await self._run("DEL", network, plugin, attachment, previous)
            except WherryError as error:
                errors.append(error)
        return errors

    async def _run(
        self,
        command: str,
        network: NetworkList,
        plugin: Mapping[str, Any],
        attachment: Attachment,
        previous: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        """One plugin of a chain, with what the ones before it made."""
        settings: dict[str, Any] = dict(plugin)
        offered = settings.pop("capabilities", None) or {}
        asked = {name: value for name, value in attachment.capabilities.items() if offered.get(name)}
        if asked:
            settings["runtimeConfig"] = asked
        if previous:
            settings["prevResult"] = previous
        variables = {
            "CNI_CONTAINERID": attachment.container,
            "CNI_IFNAME": attachment.interface,
            "CNI_NETNS": attachment.netns,
            "CNI_ARGS": ";".join(f"{key}={value}" for key, value in attachment.args),
        }
        return await self._execute(command, network, settings, variables)

    async def _execute(
        self, command: str, network: NetworkList, settings: Mapping[str, Any], variables: Mapping[str, str]
    ) -> dict[str, Any]:
        whole = {**settings, "name": network.name, "cniVersion": network.version}
        whole.pop("capabilities", None)
        return await execute(
            settings["type"],
            self._bin_dirs,
            command,
            whole,
            variables=variables,
            seconds=self._timeout,
            within=self._within,
        )

    def _kept(self, network: str, attachment: Attachment) -> Cached:
        kept = self._cache.read(network, attachment)
        if kept is None:
            raise NotFound(f"container {quote(attachment.container)} on network {quote(network)}: not found")
        return kept

    def _alone(self, attachment: Attachment) -> asyncio.Lock:
        """A container's interface is changed by one command at a time (spec, section 2)."""
        key = attachment.container, attachment.interface
        if len(self._locks) > 256:
            self._locks = {key: lock for key, lock in self._locks.items() if lock.locked()}
        return self._locks.setdefault(key, asyncio.Lock())


def _merged(kept: Attachment, given: Attachment) -> Attachment:
    """As it was made, with the namespace as it is now: a container that is gone has none any more."""
    return Attachment(kept.container, kept.interface, given.netns, kept.args, kept.capabilities)


def _check(attachment: Attachment) -> None:
    if not _ID.fullmatch(attachment.container):
        raise InvalidArgument(f"{quote(attachment.container)} can't be a container's id for CNI: invalid argument")
    if not _INTERFACE.fullmatch(attachment.interface) or attachment.interface in (".", ".."):
        raise InvalidArgument(f"{quote(attachment.interface)} is no interface's name: invalid argument")


__all__ = ["BIN_DIRS", "CACHE_DIR", "CONF_DIR", "Cni", "PluginError"]
