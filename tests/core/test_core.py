"""The vocabulary: identifiers, digests, descriptors, references, type URLs, topics, labels."""

from __future__ import annotations

import pytest

from wherry.core import labels, mediatypes, names, reference, topics, typeurl
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest, chain_id, chain_ids
from wherry.core.errors import Code, FailedPrecondition, InvalidArgument, NotFound, WherryError, from_code
from wherry.core.platforms import Platform
from wherry.proto import events_pb2

SHA = "sha256:" + "a" * 64


@pytest.mark.parametrize("good", ["a", "A1", "a-b", "a_b.c-9", "x" * 76, "0"])
def test_identifiers(good: str) -> None:
    assert names.check_identifier("container.ID", good) == good


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("", "identifier must not be empty"),
        ("x" * 77, "greater than maximum length (76 characters)"),
        *[
            (bad, "must match ^[A-Za-z0-9]+")
            for bad in ("..", "a/b", "a..b", "-a", "a-", "a b", "ä", "a\n", "a__b", "\0")
        ],
    ],
)
def test_bad_identifiers_are_named(bad: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.check_identifier("container.ID", bad)
    assert text in caught.value.message
    assert caught.value.message.startswith("container.ID: identifier ")
    assert "\n" not in caught.value.message


def test_namespaces() -> None:
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        names.require_namespace(None)
    with pytest.raises(InvalidArgument, match="namespace validation"):
        names.require_namespace("a/b")
    assert names.require_namespace("k8s.io") == "k8s.io"


def test_quoting_is_as_in_go() -> None:
    assert names.quote('a"b\\c\n\x01é\u2028') == '"a\\"b\\\\c\\n\\x01é\\u2028"'


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("", "invalid checksum digest format"),
        ("sha256", "invalid checksum digest format"),
        ("sha256:abc", "invalid checksum digest length"),
        ("md5:" + "a" * 32, "unsupported digest algorithm"),
        ("sha256:" + "A" * 64, "invalid checksum digest format"),
        (SHA + "\n", "invalid checksum digest format"),
        ("sha256:../" + "a" * 61, "invalid checksum digest format"),
    ],
)
def test_bad_digests(bad: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        Digest.parse(bad)


def test_digests() -> None:
    digest = Digest.of(b"")
    assert digest == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (digest.algorithm, len(digest.encoded)) == ("sha256", 64)
    assert Digest.parse(digest) is digest
    assert Digest.of_chunks([b"a", b"b"], "sha512") == Digest.of(b"ab", "sha512")


def test_chain_ids() -> None:
    first, second = Digest.of(b"1"), Digest.of(b"2")
    assert chain_id([first]) == first
    assert chain_id([first, second]) == Digest.of(f"{first} {second}".encode())
    assert chain_ids([first, second]) == [first, chain_id([first, second])]
    with pytest.raises(InvalidArgument):
        chain_id([])


def test_descriptors_go_through_json() -> None:
    value = {
        "mediaType": mediatypes.OCI_MANIFEST,
        "digest": SHA,
        "size": 7,
        "annotations": {"a": "b"},
        "data": "YWJj",
        "platform": {"architecture": "arm", "os": "linux", "variant": "v7"},
        "artifactType": "x/y",
    }
    descriptor = Descriptor.from_json(value)
    assert descriptor.platform == Platform("linux", "arm", "v7")
    assert descriptor.data == b"abc"
    assert descriptor.to_json() == value
    assert len({descriptor, Descriptor.from_json({k: value[k] for k in ("mediaType", "digest", "size")})}) == 1


@pytest.mark.parametrize(
    "bad",
    [None, [], {}, {"digest": SHA}, {"digest": SHA, "size": -1}, {"digest": SHA, "size": "1"}, {"digest": 1, "size": 1}]
    + [{"digest": SHA, "size": 1, key: 1} for key in ("mediaType", "annotations", "platform")]
    + [{"digest": SHA, "size": True}, {"digest": SHA, "size": 1, "data": "?"}],
)
def test_bad_descriptors(bad: object) -> None:
    with pytest.raises(InvalidArgument):
        Descriptor.from_json(bad)


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("user/app", "docker.io/user/app:latest"),
        ("index.docker.io/x", "docker.io/library/x:latest"),
        ("localhost/x", "localhost/x:latest"),
        ("localhost:5000/a/b_c__d-e:T", "localhost:5000/a/b_c__d-e:T"),
        ("[::1]:5000/x", "[::1]:5000/x:latest"),
        (f"ghcr.io/x@{SHA}", f"ghcr.io/x@{SHA}"),
        (f"ghcr.io/x:t@{SHA}", f"ghcr.io/x:t@{SHA}"),
    ],
)
def test_familiar_names(text: str, full: str) -> None:
    parsed = reference.parse_familiar(text)
    assert str(parsed) == full
    assert reference.parse(full) == parsed
    assert reference.parse_familiar(parsed.familiar) == parsed


@pytest.mark.parametrize(
    "bad",
    ["", "Foo", "a/Foo", "x:", "x@", "x@sha256:1", "a//b", "/x", "x:-t", "x y", "a" * 300, "a" * 64, "../x", "x/.."],
)
def test_bad_names(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        reference.parse_familiar(bad)


def test_a_complete_reference_needs_a_host() -> None:
    with pytest.raises(InvalidArgument, match="hostname required"):
        reference.parse("busybox")
    assert reference.parse("docker.io/library/x").tag == ""


def test_any_has_bare_names() -> None:
    message = events_pb2.TaskOOM(container_id="x")
    packed = typeurl.pack(message)
    assert packed.type_url == "containerd.events.TaskOOM"
    assert typeurl.unpack(packed) == message
    packed.type_url = "type.googleapis.com/containerd.events.TaskOOM"
    assert typeurl.unpack_as(packed, events_pb2.TaskOOM) == message
    with pytest.raises(InvalidArgument, match="can't unmarshal type"):
        typeurl.unpack_as(packed, events_pb2.TaskExit)
    packed.value = b"\xff"
    with pytest.raises(InvalidArgument):
        typeurl.unpack(packed)
    packed.type_url = "no.Such"
    with pytest.raises(NotFound):
        typeurl.unpack(packed)


def test_json_in_any() -> None:
    packed = typeurl.pack_json(typeurl.SPEC, {"ociVersion": "1.1.0"})
    assert packed.value == b'{"ociVersion":"1.1.0"}'
    assert typeurl.unpack_json(packed, typeurl.SPEC) == {"ociVersion": "1.1.0"}
    packed.value = b"{"
    with pytest.raises(InvalidArgument, match="not JSON"):
        typeurl.unpack_json(packed)


@pytest.mark.parametrize("bad", ["", "tasks/exit", "/", "/a//b", "/a/..", "/" + "x" * 77])
def test_bad_topics(bad: str) -> None:
    with pytest.raises(InvalidArgument):
        topics.check_topic(bad)
    assert topics.check_topic(topics.TASK_EXEC_ADDED) == "/tasks/exec-added"


def test_labels_have_a_limit() -> None:
    labels.check_labels({"k": "v" * 4095})
    with pytest.raises(InvalidArgument, match="maximum size"):
        labels.check_labels({"k": "v" * 4096})


def test_media_types() -> None:
    assert mediatypes.is_index(mediatypes.DOCKER_LIST + "; charset=utf-8")
    assert mediatypes.is_layer(mediatypes.OCI_LAYER_ZSTD)
    assert not mediatypes.is_layer(mediatypes.OCI_CONFIG)
    assert mediatypes.compression(mediatypes.DOCKER_LAYER_GZIP) == "gzip"
    assert mediatypes.compression(mediatypes.DOCKER_LAYER) is None
    assert mediatypes.compression(mediatypes.OCI_LAYER) == ""


def test_error_kinds_go_through_codes() -> None:
    codes = [value for value in vars(Code).values() if isinstance(value, int)]
    assert sorted(codes) == list(range(17))
    for code in codes:
        if code != Code.OK:
            assert from_code(code, "x").code == code
    assert type(from_code(99, "x")) is WherryError
