"""Registries without the image store: copy from one to another, inspect, list tags."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wherry.cli.arguments import user_secret
from wherry.cli.output import print_json
from wherry.cli.table import Command
from wherry.cli.transfers import full_name, progress_options, registry, registry_options, result, show
from wherry.client.registry_end import Registry
from wherry.core.credentials import from_docker_config
from wherry.core.errors import InvalidArgument, Unimplemented
from wherry.core.mediatypes import is_config, is_index, is_manifest
from wherry.core.platforms import host, parse
from wherry.core.reference import parse_familiar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wherry.cli.session import Session
    from wherry.client.registries import Document


@contextmanager
def _ours() -> Iterator[None]:
    try:
        yield
    except Unimplemented as error:
        raise Unimplemented(f"this daemon doesn't do that, as wherryd does ({error.message})") from error


async def copy(session: Session, args: argparse.Namespace) -> None:
    """Copies an image from registry to registry and prints its new name."""
    target = full_name(args.target)
    source = registry(args, full_name(args.source))
    plain = args.target_plain_http or args.plain_http
    user = args.target_user or ("" if not _same_host(source.reference, target) else args.user)
    destination = Registry(
        reference=target,
        user=user_secret(user),
        scheme="http" if plain else "",
        hosts_dir=args.hosts_dir,
        credentials=from_docker_config(),
    )
    platforms = [parse(text) for text in args.platform]
    with _ours():
        steps = session.client.transfer.copy(source, destination, platforms=platforms)
        await show(steps, quiet=args.quiet, style=args.format)
    result(args, target)


def _same_host(one: str, other: str) -> bool:
    return parse_familiar(one).host == parse_familiar(other).host


async def inspect(session: Session, args: argparse.Namespace) -> None:
    """Prints what an image is: here, or with --remote in its registry, without pulling it."""
    wanted = [] if args.all_platforms else [parse(text) for text in args.platform] or [host()]
    if args.remote:
        name = full_name(args.image)
        with _ours():
            documents = await session.client.registries.inspect(
                registry(args, name), platforms=[] if args.raw else wanted, all_platforms=args.all_platforms
            )
    else:
        from wherry.client.manifests import documents as local_documents

        image = await session.client.images.find(args.image)
        name = image.name
        documents = await local_documents(session.client.content, image.target, wanted)
    if args.raw:
        # byte for byte: its digest is that of the image
        sys.stdout.flush()
        sys.stdout.buffer.write(documents[0].data)
        return
    print_json(_described(name, documents))


def _described(name: str, documents: list[Document]) -> dict[str, Any]:
    """The root, and of each platform its manifest with the configuration behind it."""
    root = documents[0]
    value: dict[str, Any] = {"Name": name, "Target": root.target.to_json()}
    if is_index(root.target.media_type):
        value["Index"] = root.value
    found: list[dict[str, Any]] = []
    for document in documents:
        if is_manifest(document.target.media_type):
            found.append({"Digest": document.target.digest, "Platform": None, "Manifest": document.value})
        elif is_config(document.target.media_type) and found:
            config = document.value
            parts = (config.get("os"), config.get("architecture"), config.get("variant"))
            found[-1] |= {"Platform": "/".join(str(part) for part in parts if part), "Config": config}
    value["Images"] = found
    return value


async def tags(session: Session, args: argparse.Namespace) -> None:
    """Prints the tags of a repository in a registry."""
    parsed = parse_familiar(args.repository)
    if parsed.digest or parsed.tag not in {"", "latest"} or args.repository.endswith(":latest"):
        raise InvalidArgument(f"{args.repository} is an image; a repository has no tag")
    with _ours():
        found = await session.client.registries.tags(registry(args, parsed.name))
    if args.format == "json":
        print_json({"Name": parsed.name, "Tags": found})
    else:
        for tag in found:
            print(tag)


def _copy_options(parser: argparse.ArgumentParser) -> None:
    registry_options(parser)
    progress_options(parser)
    parser.add_argument("--target-user", default="", metavar="USER[:PASSWORD]", help="who you are at the target")
    parser.add_argument("--target-plain-http", action="store_true", help="HTTP without TLS for the target alone")
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="one platform (all)")
    parser.add_argument("source", metavar="IMAGE", help="what to copy")
    parser.add_argument("target", metavar="TARGET", help="its name in the other registry")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    registry_options(parser)
    parser.add_argument("--remote", action="store_true", help="in the registry, without pulling it")
    parser.add_argument("--raw", action="store_true", help="the manifest or index alone, byte for byte")
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="platforms (the host's)")
    parser.add_argument("--all-platforms", action="store_true", help="all platforms")
    parser.add_argument("image", metavar="IMAGE")


def _tags_options(parser: argparse.ArgumentParser) -> None:
    registry_options(parser)
    parser.add_argument("--format", choices=("plain", "json"), default="plain", help="one a line, or JSON")
    parser.add_argument("repository", metavar="REPOSITORY", help="registry.example/app")


COMMANDS = [
    Command(
        ("copy", "cp"), "copy an image from registry to registry, without storing it", copy, _copy_options,
        "wherry images copy alpine:3.20 registry.example/base/alpine:3.20",
    ),
    Command(
        ("inspect",), "show what an image is made of, here or in its registry", inspect, _inspect_options,
        "wherry images inspect --remote alpine",
    ),
    Command(("tags",), "list a repository's tags in its registry", tags, _tags_options, "wherry images tags alpine"),
]  # fmt: skip
