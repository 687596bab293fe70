"""The verbs for images as docker has them: images, tag, rmi, history, save, load."""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from wherry.cli.formats import Headings, cut, decimal_size, filters, format_option, labels_fit, listing_flags, show
from wherry.cli.saying import each
from wherry.cli.table import Command
from wherry.cli.terminal import is_terminal
from wherry.client.finding import short_image
from wherry.client.images import Image
from wherry.client.pictures import Found, all_images, find_image
from wherry.client.states import ago
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry.core.reference import parse_familiar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wherry.cli.session import Session
    from wherry.client.api import Client

COLUMNS: Headings = {
    "Repository": "REPOSITORY",
    "Tag": "TAG",
    "ID": "IMAGE ID",
    "CreatedSince": "CREATED",
    "Size": "SIZE",
}
HISTORY: Headings = {
    "ID": "IMAGE",
    "CreatedSince": "CREATED",
    "CreatedBy": "CREATED BY",
    "Size": "SIZE",
    "Comment": "COMMENT",
}
FILTERS = ("reference", "label", "dangling", "before", "since", "until")
ID = 12


async def images(session: Session, args: argparse.Namespace) -> None:
    """Prints the images, one line for each name that says something (`told`)."""
    client = session.client
    found = filters(args.filter, FILTERS)
    items = [item for item in await all_images(client) if told(item)]
    items.sort(key=lambda item: (-created(item), item.image.name))
    wanted = [item for item in items if _fits(found, item, items, args.repository)]
    columns = {"Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", **COLUMNS} if args.digests else COLUMNS
    rows = [_row(item, whole=args.no_trunc) for item in wanted]
    if args.quiet and not args.format:
        # an image with several names is one
        rows = list({row["ID"]: row for row in rows}.values())
    show(args, rows, columns)


def created(item: Found) -> float:
    """When an image was built, as its configuration says; else when its name was made here."""
    text = str(item.look.document.get("created") or "") if item.look is not None else ""
    return parse_time(text) or item.image.created_at


def parse_time(text: str) -> float:
    """Seconds since the epoch from RFC 3339; 0.0 for what is none."""
    match = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    if match is None or match[1] == "0001":
        return 0.0
    import calendar

    at = float(calendar.timegm((*map(int, match.groups()[:6]), 0, 0, 0)))
    if match[7] != "Z":
        hours, minutes = match[7][1:].split(":")
        at -= (int(hours) * 3600 + int(minutes) * 60) * (-1 if match[7][0] == "-" else 1)
    return at


def _row(item: Found, *, whole: bool) -> dict[str, Any]:
    repository, tag = split_name(item.image.name)
    at = created(item)
    digest = item.id.removeprefix("sha256:")
    size = sum(layer.size for layer in item.look.layers) if item.look is not None else item.image.target.size
    return {
        "ID": item.id if whole else digest[:ID],
        "Repository": repository,
        "Tag": tag,
        "Digest": str(item.image.target.digest),
        "CreatedSince": f"{ago(at)} ago" if at else "N/A",
        "CreatedAt": time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(at)) if at else "N/A",
        "Size": decimal_size(size),
        "Platform": str(item.look.platform) if item.look is not None else "",
        "Name": item.image.name,
    }


def split_name(name: str) -> tuple[str, str]:
    """Repository and tag as docker shows them; `<none>` where there is none."""
    if re.fullmatch(r"sha256:[0-9a-f]{64}", name):
        return "<none>", "<none>"
    plain = name.partition("@")[0]
    head, slash, last = plain.rpartition("/")
    repository, _, tag = last.partition(":")
    return short_image(f"{head}{slash}{repository}"), tag or "<none>"


def told(item: Found) -> bool:
    """Whether a name is a line of its own.

    Kubernetes' images have three (docs/kubernetes.md): the id and the one by digest say nothing beside the tag.
    """
    repository, tag = split_name(item.image.name)
    if tag != "<none>" or len(item.names) == 1:
        return True
    others = [split_name(name) for name in item.names]
    if repository == "<none>":
        return all(other == (repository, tag) for other in others)
    return not any(other == repository and its != "<none>" for other, its in others)


def dangling(item: Found) -> bool:
    """Whether none of an image's names has a tag."""
    return all(split_name(name)[1] == "<none>" for name in item.names)


def _fits(found: dict[str, list[str]], item: Found, items: list[Found], repository: str) -> bool:
    settings = item.look.settings if item.look is not None else {}
    labels = {str(key): str(value) for key, value in (settings.get("Labels") or {}).items()}
    name = short_image(item.image.name)
    bare, tag = split_name(item.image.name)
    tests = {
        "reference": lambda value: any(fnmatch.fnmatchcase(text, value) for text in (name, bare, item.image.name)),
        "dangling": lambda value: (tag == "<none>") == (value.lower() in {"1", "true"}),
        "before": lambda value: created(item) < created(_other(value, items)),
        "since": lambda value: created(item) > created(_other(value, items)),
        "until": lambda value: created(item) < moment(value),
    }
    if not labels_fit(found.get("label", ()), labels):
        return False
    if repository and not any(fnmatch.fnmatchcase(text, repository) for text in (name, bare, item.image.name)):
        return False
    return all(any(tests[key](value) for value in values) for key, values in found.items() if key != "label")


def moment(text: str) -> float:
    """A time from RFC 3339, seconds since the epoch, or how long ago (`24h`). Raises InvalidArgument."""
    if text.replace(".", "", 1).isdigit():
        return float(text)
    at = parse_time(text)
    if at:
        return at
    from wherry.cli.arguments import duration

    try:
        return time.time() - duration(text)
    except argparse.ArgumentTypeError:
        raise InvalidArgument(f"{text!r} is no time: RFC 3339, seconds since the epoch, or a duration (24h)") from None


def _other(value: str, items: list[Found]) -> Found:
    full = str(parse_familiar(value)) if not re.fullmatch(r"[0-9a-f]{2,64}", value) else ""
    for item in items:
        if item.image.name == full or (not full and item.id.removeprefix("sha256:").startswith(value)):
            return item
    raise NotFound(f"no such image: {value}")


async def tag(session: Session, args: argparse.Namespace) -> None:
    """Gives an image a further name; one that another image has is taken from it."""
    found = await find_image(session.client, args.source)
    await session.client.images.put(Image(str(parse_familiar(args.target)), found.image.target, found.image.labels))


async def rmi(session: Session, args: argparse.Namespace) -> int:
    """Removes names, and with the last one the image."""
    client = session.client
    return await each(args.images, lambda name: _remove(client, name, force=args.force), missing_ok=args.force)


async def _remove(client: Client, reference: str, *, force: bool) -> list[str]:
    found = await find_image(client, reference)
    by_id = re.fullmatch(r"(?:sha256:)?[0-9a-f]+", reference) is not None and found.image.name != reference
    by_id = by_id and short_image(found.image.name).partition(":")[0] != reference
    names = list(found.names) if by_id else [found.image.name]
    if by_id and len(names) > 1 and not force:
        raise FailedPrecondition(
            f"unable to delete {reference}: the image has several names ({', '.join(map(short_image, names))}); "
            "remove them one by one, or use -f"
        )
    for name in names:
        users = [item.id[:ID] for item in await client.containers.list([f"image=={name}"])]
        if users and not force:
            raise FailedPrecondition(
                f"unable to remove {short_image(name)}: container {', '.join(users)} is made from it; "
                "remove that first ('wherry rm'), or use -f"
            )
    lines = []
    for name in names:
        await client.images.delete(name, sync=name == names[-1])
        lines.append(f"Untagged: {short_image(name)}")
    if len(names) == len(found.names):
        lines.append(f"Deleted: {found.id}")
    return lines


async def history(session: Session, args: argparse.Namespace) -> None:
    """Prints how an image was built, the last step first."""
    found = await find_image(session.client, args.image)
    if found.look is None:
        raise NotFound(f"image {args.image} isn't here for this platform: 'wherry pull {args.image}' brings it")
    layers = list(found.look.layers)
    rows = []
    for step in found.look.document.get("history") or ():
        at = parse_time(str(step.get("created") or ""))
        size = 0 if step.get("empty_layer") or not layers else layers.pop(0).size
        by = str(step.get("created_by") or "")
        rows.append(
            {
                "ID": "<missing>",
                "CreatedSince": f"{ago(at)} ago" if at else "N/A",
                "CreatedAt": step.get("created") or "",
                "CreatedBy": cut(by, 45, whole=args.no_trunc),
                "Size": decimal_size(size) if args.human else str(size),
                "Comment": step.get("comment") or "",
            }
        )
    rows.reverse()
    if rows:
        rows[0]["ID"] = found.id if args.no_trunc else found.id.removeprefix("sha256:")[:ID]
    show(args, rows, HISTORY)


async def save(session: Session, args: argparse.Namespace) -> None:
    """Writes images as an archive that docker, podman and skopeo read."""
    from wherry.client import archive

    client = session.client
    images_ = [(await find_image(client, name)).image for name in args.images]
    if args.output:
        with open(args.output, "wb") as target:
            await archive.save(client, images_, target, whole=args.all_platforms)
        return
    if is_terminal(1):
        raise InvalidArgument("an archive isn't for a terminal: name a file with -o, or send it on")
    await archive.save(client, images_, sys.stdout.buffer, whole=args.all_platforms)
    sys.stdout.buffer.flush()


async def load(session: Session, args: argparse.Namespace) -> None:
    """Reads an archive and prints what it held."""
    from wherry.cli.image_files import _open
    from wherry.client import archive
    from wherry.client.unpack import unpack

    client = session.client
    if not args.input and is_terminal(0):
        raise InvalidArgument("no archive: name a file with -i, or send one in")
    with _open(args.input or "-") as source:
        loaded = await archive.load(client, source)
    snapshotter = await client.namespaces.default_snapshotter()
    for found in _unpackable([await find_image(client, image.name) for image in loaded]):
        if found.look is not None:
            await unpack(client, found.look, snapshotter)
    for image in loaded:
        print(f"Loaded image: {short_image(image.name)}")


def _unpackable(items: Iterable[Found]) -> list[Found]:
    return list({item.id: item for item in items}.values())


def _images_options(parser: argparse.ArgumentParser) -> None:
    listing_flags(parser)
    parser.add_argument("-a", "--all", action="store_true", help="all there are (there are no others)")
    parser.add_argument("--digests", action="store_true", help="with digests")
    parser.add_argument("repository", nargs="?", default="", metavar="REPOSITORY[:TAG]", help="only this one")


def _tag_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IMAGE")
    parser.add_argument("target", metavar="NAME[:TAG]")


def _rmi_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="also while containers are made from it")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _history_options(parser: argparse.ArgumentParser) -> None:
    format_option(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the ids")
    parser.add_argument("--no-trunc", action="store_true", help="whole ids and texts")
    parser.add_argument("-H", "--human", action=argparse.BooleanOptionalAction, default=True, help="sizes for people")
    parser.add_argument("image", metavar="IMAGE")


def _save_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="", metavar="FILE", help="instead of the output")
    parser.add_argument("--all-platforms", action="store_true", help="not only for this host")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input", default="", metavar="FILE", help="instead of the input")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress (there is none)")


COMMANDS = [
    Command(("images",), "list images", images, _images_options, "wherry images --filter reference='alpine*'"),
    Command(("tag",), "give an image a further name", tag, _tag_options, "wherry tag alpine registry.example/alpine:1"),
    Command(("rmi",), "remove images", rmi, _rmi_options, "wherry rmi alpine"),
    Command(("history",), "show how an image was built", history, _history_options, "wherry history --no-trunc alpine"),
    Command(("save",), "write images as an archive", save, _save_options, "wherry save -o alpine.tar alpine"),
    Command(("load",), "read images from an archive", load, _load_options, "wherry load -i alpine.tar"),
]
