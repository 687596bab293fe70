"""What comes from outside (names, manifests, challenges, hosts.toml, archives): a clear error, or a value that fits."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import re
import string
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wherry.client.building import children
from wherry.client.commit import apply_instruction, parse_instruction
from wherry.core import mediatypes, reference
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument, WherryError
from wherry.core.platforms import parse as parse_platform
from wherry.daemon.transfer_archive import ArchiveReader, decompressed
from wherry.daemon.transfer_image import Selection, children_labels, children_of, parse_document
from wherry.registry.auth import parse_challenges
from wherry.registry.hosts import hosts_for
from wherry.registry.retry import seconds_of

# the same cases each time, and nothing left on disk; a loaded machine is slow
settings.register_profile(
    "wherry", derandomize=True, database=None, deadline=None, max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("wherry")

NAMES = st.text(string.ascii_letters + string.digits + "._-/:@[]sha256 \u00e9\n", max_size=80)
PART = st.text("abc019._-", min_size=1, max_size=12).map(lambda text: re.sub(r"[._-]+", "-", text).strip("-") or "x")
TAG = st.text("abcXYZ019._-", min_size=1, max_size=20).map(lambda text: f"v{text}")
HOST = st.sampled_from(["docker.io", "localhost", "r.example:5000", "127.0.0.1:5000", "[::1]:5000", "EXAMPLE.com"])
DIGESTS = st.binary(max_size=4).map(lambda data: str(Digest.of(data)))


def named(error: WherryError, *words: str) -> None:
    """The error says what it is about."""
    assert any(word in error.message for word in words), error.message


# -- references


@given(NAMES)
@example("a" * 300)
@example("docker.io/" + "a/" * 200 + "a")
@example("@")
@example("a@sha256:")
@example("a:b:c")
@example("a//b")
@example("\x00")
def test_any_text_as_a_reference(text: str) -> None:
    for parse in (reference.parse, reference.parse_familiar):
        try:
            found = parse(text)
        except InvalidArgument:
            continue
        # what was read is written so that it is read the same way
        assert reference.parse(str(found)) == found
        assert reference.parse_familiar(found.familiar) == found or not found.object or "/" not in found.path
        assert "\n" not in str(found)
        assert " " not in str(found)


@given(HOST, st.lists(PART, min_size=1, max_size=4), st.none() | TAG, st.none() | DIGESTS)
def test_references_that_are_right(host: str, parts: list[str], tag: str | None, digest: str | None) -> None:
    text = f"{host}/{'/'.join(parts)}" + (f":{tag}" if tag else "") + (f"@{digest}" if digest else "")
    found = reference.parse(text)
    assert (found.host, found.path, found.tag, found.digest) == (host, "/".join(parts), tag or "", digest)
    assert str(found) == text


# -- manifests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | DIGESTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["mediaType", "digest", "size", "annotations", "platform", "urls", "data", "artifactType"]
DESCRIPTOR = st.fixed_dictionaries(
    {"mediaType": st.sampled_from([mediatypes.OCI_LAYER_GZIP, mediatypes.OCI_CONFIG, "x"]) | JSON,
     "digest": DIGESTS | JSON, "size": st.integers(-1, 1 << 70) | JSON},
    optional=dict.fromkeys(FIELDS[3:], JSON)
    | {"platform": st.fixed_dictionaries({}, optional={"os": JSON, "architecture": JSON, "variant": JSON,
                                                        "os.version": JSON, "os.features": JSON})},
)  # fmt: skip
MANIFEST = st.fixed_dictionaries(
    {},
    optional={"config": DESCRIPTOR | JSON, "layers": st.lists(DESCRIPTOR | JSON, max_size=4) | JSON,
              "manifests": st.lists(DESCRIPTOR | JSON, max_size=4) | JSON, "fsLayers": JSON, "mediaType": JSON},
)  # fmt: skip
KINDS = st.sampled_from([mediatypes.OCI_MANIFEST, mediatypes.OCI_INDEX, mediatypes.DOCKER_LIST, "application/x"])


@given(MANIFEST | JSON, KINDS)
@example({"config": {"digest": str(Digest.of(b"")), "size": 0, "urls": 5}}, mediatypes.OCI_MANIFEST)
@example(
    {"manifests": [{"digest": str(Digest.of(b"")), "size": 0, "platform": {"os.features": 5}}]}, mediatypes.OCI_INDEX
)
def test_any_json_as_a_manifest(document: Any, kind: str) -> None:
    data = json.dumps(document).encode()
    root = Descriptor(kind, Digest.of(data), len(data))
    try:
        found = children_of(parse_document(data, root), root)
    except WherryError as error:
        # it says which manifest it was
        named(error, str(root.digest), "invalid")
    else:
        for child in found:
            assert Descriptor.from_json(json.loads(json.dumps(child.to_json()))) == child
        assert set(children_labels(found).values()) == {str(child.digest) for child in found}
        assert len(Selection([parse_platform("linux/amd64")]).choose(found)) <= max(len(found), 1)
    with contextlib.suppress(WherryError):
        children(document)


@given(st.binary(max_size=300))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"config": NaN}')
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes_as_a_manifest(data: bytes) -> None:
    root = Descriptor(mediatypes.OCI_MANIFEST, Digest.of(data), len(data))
    try:
        children_of(parse_document(data, root), root)
    except InvalidArgument as error:
        named(error, str(root.digest))


# -- what registries and users write


@given(st.lists(st.text(max_size=80), max_size=3))
@example(['Bearer realm="' + "\\" * 50_000])
@example(["a " * 20_000])
@example(["Bearer " + "a=b," * 20_000])
def test_any_challenge(headers: list[str]) -> None:
    for challenge in parse_challenges(headers):
        assert challenge.scheme == challenge.scheme.lower()


@given(st.text(max_size=40))
def test_any_retry_after(text: str) -> None:
    assert 0 <= seconds_of(text) < 1e12


TOML = st.recursive(
    st.booleans() | st.integers(-5, 5) | st.text(string.printable, max_size=10),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
KEYS = ["server", "capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "proxy"]


def toml(value: Any) -> str:
    return json.dumps(value).replace("\x7f", "")


@given(
    st.dictionaries(st.sampled_from(KEYS), TOML), st.dictionaries(st.sampled_from(KEYS[1:]), TOML), st.text(max_size=20)
)
def test_any_hosts_toml(
    tmp_path_factory: pytest.TempPathFactory, top: dict[str, Any], host: dict[str, Any], address: str
) -> None:
    folder = Path(tmp_path_factory.getbasetemp()) / "hosts-fuzz" / "x.example"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key} = {toml(value)}" for key, value in top.items()]
    lines += [f"[host.{toml(address)}]", *(f"{key} = {toml(value)}" for key, value in host.items())]
    (folder / "hosts.toml").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    try:
        found = hosts_for("x.example", config_dir=str(folder.parent))
    except InvalidArgument as error:
        named(error, "hosts.toml")
    else:
        assert all(item.scheme in {"http", "https"} and item.netloc for item in found)


@given(st.text(max_size=60))
@example('ENV A="b')
@example("CMD [1]")
@example("LABEL a b")
def test_any_instruction(text: str) -> None:
    settings_of_image: dict[str, Any] = {}
    try:
        apply_instruction(settings_of_image, *parse_instruction(text))
    except InvalidArgument:
        assert settings_of_image == {}
    else:
        assert json.dumps(settings_of_image)


# -- archives


def archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, size in {"oci-layout": 30, "blobs/sha256/" + "a" * 64: 700, "long/" + "n" * 200: 5}.items():
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    return made.getvalue()


ARCHIVE = archive()


async def read(data: bytes, step: int) -> int:
    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(data), step):
            yield data[at : at + step]

    reader = ArchiveReader(decompressed(chunks()))
    total = 0
    async for member in reader.members():
        if member.is_file:
            async for chunk in reader.content():
                total += len(chunk)
    return total


@given(
    st.lists(st.tuples(st.integers(0, len(ARCHIVE) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(ARCHIVE)),
    st.sampled_from([1, 100, 511, 512, 4096, 1 << 20]),
    st.booleans(),
)
def test_archives_that_were_damaged(changes: list[tuple[int, int]], cut: int, step: int, packed: bool) -> None:
    data = bytearray(ARCHIVE)
    for at, value in changes:
        data[at] = value
    damaged = bytes(data[: cut or len(data)])
    whole = gzip.compress(damaged, 1) if packed else damaged
    try:
        assert asyncio.run(read(whole, step)) <= len(ARCHIVE)
    except WherryError as error:
        named(error, "archive")


@given(st.binary(max_size=2000), st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd"]))
def test_any_bytes_as_an_archive(data: bytes, head: bytes) -> None:
    try:
        asyncio.run(read(head + data, 100))
    except WherryError as error:
        named(error, "archive")
