"""`wherry pull`, `push`, `images copy`, `inspect` and `tags` as people run them; a daemon that is killed meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import busybox
from tests.cli.conftest import Wherry
from tests.containerd import Containerd
from tests.daemon.test_transfer_copy import artifact
from tests.daemon.transfer_rig import Image, make_image, make_index, publish, tar
from tests.peers import need
from tests.registry.conftest import PASSWORD, USER, locked_registry, registry
from tests.sid import need_sid
from tests.wherryd import BUSYBOX, Wherryd
from wherry.cli.progress import Display
from wherry.client.transfer import Progress
from wherry.core.platforms import host, parse

__all__ = ["locked_registry", "registry"]
NOISE = random.Random(5).randbytes(4_000_000)


@contextmanager
def slow_registry(image: Image, rate: int) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """A registry with one image whose blobs come at `rate` bytes a second; what it was asked for, with the offset."""
    asked: list[tuple[str, int]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            descriptor, data = image.blobs[name if name in image.blobs else image.target.digest]
            start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
            asked.append((name, start))
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", descriptor.media_type)
            self.send_header("Docker-Content-Digest", str(descriptor.digest))
            self.send_header("Content-Length", str(len(data) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            try:
                for at in range(start if self.command == "GET" else len(data), len(data), 1 << 16):
                    self.wfile.write(data[at : at + (1 << 16)])
                    if len(data) > 1 << 20:
                        time.sleep((1 << 16) / rate)
            except OSError:
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815 - the name that the base class looks for

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}/slow:v1", asked
    finally:
        server.shutdown()
        server.server_close()


def layer_of(image: Image) -> str:
    return str(next(d for d, _ in image.blobs.values() if "layer" in d.media_type).digest)


@pytest.mark.parametrize("victim", ["daemon", "client"])
def test_a_killed_pull_goes_on_where_it_stopped(victim: str) -> None:
    image = make_image([tar({"noise": NOISE})])
    layer = layer_of(image)
    daemon = Wherryd()
    try:
        daemon.start()
        wherry = Wherry(daemon.address)
        with slow_registry(image, 3_000_000) as (name, asked):
            process = wherry.start("pull", "-q", "--plain-http", name, stderr=subprocess.DEVNULL)
            data = None
            for _ in range(600):
                data = next((p for p in daemon.root.rglob("ingest/*/data") if p.stat().st_size >= 1 << 20), None)
                if data is not None:
                    break
                time.sleep(0.02)
            assert data is not None
            if victim == "daemon":
                daemon.kill()
                process.kill()
                process.wait(60)
                daemon.start()
            else:
                process.kill()
                process.wait(60)
            assert wherry.run("pull", "-q", "--plain-http", name, timeout=90).stdout == f"{name}\n"
            starts = [start for digest, start in asked if digest == layer]
            assert starts[0] == 0
            assert starts[-1] >= 1 << 20, asked
            assert wherry.run("content", "ls", "-q").stdout.count("sha256:") == len(image.blobs)
    finally:
        daemon.close()


def test_a_second_pull_is_quick(wherry: Wherry, registry: str) -> None:
    """Measured from the first byte of the command to its end; the bound is wide, since others use this machine."""
    name = f"{registry}/quick/again:v1"
    asyncio.run(publish(make_image([tar({"a": b"x" * 5000})]), name))
    wherry.run("pull", "-q", "--plain-http", name)
    times = []
    for _ in range(5):
        began = time.monotonic()
        wherry.run("pull", "-q", "--plain-http", name)
        times.append(time.monotonic() - began)
    wherry.run("images", "rm", name)
    # 100 ms on a quiet machine
    assert min(times) < 0.5, times


def test_the_picture_on_a_terminal(wherry: Wherry) -> None:
    image = make_image([tar({"noise": NOISE}), tar({"small": b"x"})])
    with slow_registry(image, 4_000_000) as (name, _):
        master, slave = pty.openpty()
        process = wherry.start("pull", "--plain-http", name, stderr=slave, stdout=subprocess.DEVNULL)
        os.close(slave)
        text = b""
        try:
            while piece := os.read(master, 1 << 16):
                text += piece
        except OSError:
            # the other side of a terminal is gone: EIO
            pass
        finally:
            os.close(master)
        assert process.wait(60) == 0
        wherry.run("images", "rm", "--sync", name)
    seen = text.decode()
    short = layer_of(image)[:19]
    assert re.search(rf"layer-{short} +downloading +\[=+ *\] [\d.]+ MiB/3\.8 MiB  [\d.]+ [KM]iB/s  \d+s left", seen), (
        seen
    )
    assert re.search(rf"layer-{short} +(extracting|extracted)", seen)
    assert re.search(r"\d/4 done, [\d.]+ MiB/3\.8 MiB, \d+s, [\d.]+ [KM]iB/s, \d+s left", seen)
    assert re.search(r"4/4 done, 3\.8 MiB/3\.8 MiB", seen)


def test_lines_and_json_elsewhere(wherry: Wherry, registry: str) -> None:
    name = f"{registry}/lines/box:v1"
    asyncio.run(publish(make_image([tar({"a": b"x" * 5000})]), name))
    done = wherry.run("pull", "--plain-http", "--format", "json", name)
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert steps[-1] == {"event": "finished", "name": name}
    layers = [step for step in steps if step["name"].startswith("layer-")]
    assert layers[-1]["event"] == "extracted"
    assert layers[-1]["progress"] == layers[-1]["total"] > 0
    assert done.stderr == ""
    again = wherry.run("pull", "--plain-http", name)
    assert re.search(r"layer-sha256:\w{12} +exists", again.stderr)
    assert "\x1b" not in again.stderr
    wherry.run("images", "rm", name)


def test_more_layers_than_lines(capfd: pytest.CaptureFixture[str]) -> None:
    display = Display(live=True)
    for number in range(200):
        display.add(Progress("waiting", f"layer-sha256:{number:064x}", (), 0, 1000))
    display.add(Progress("downloading", f"layer-sha256:{7:064x}", (), 10, 1000))
    display.draw(last=True)
    text = capfd.readouterr().err.rpartition("\x1b[0J")[0].rpartition("A\x1b[2K")[2]
    assert "downloading" in text
    assert text.count("\n") < 120


def test_copy_inspect_and_tags(wherry: Wherry, registry: str, locked_registry: str, tmp_path: Path) -> None:
    source, target = f"{registry}/look/box:v1", f"{locked_registry}/copied/box:v2"
    wherry.run("images", "tag", BUSYBOX, source)
    wherry.run("push", "-q", "--plain-http", source)
    wherry.run("images", "rm", source)
    before = wherry.run("content", "ls", "-q").stdout
    copied = wherry.run("images", "copy", "--plain-http", "--target-user", f"{USER}:{PASSWORD}", source, target)
    assert copied.stdout == f"{target}\n"
    assert re.search(r"layer-sha256:\w{12} +done", copied.stderr)
    user = ["--plain-http", "--user", f"{USER}:{PASSWORD}"]
    shown = json.loads(wherry.run("images", "inspect", "--remote", *user, target).stdout)
    raw = wherry.run("images", "inspect", "--remote", "--raw", *user, target).stdout
    assert json.loads(raw) == shown["Images"][0]["Manifest"]
    assert shown["Images"][0]["Config"]["config"]["Cmd"] == ["/bin/sh"]
    skopeo = [need("skopeo"), "inspect", "--tls-verify=false", f"--creds={USER}:{PASSWORD}", f"docker://{target}"]
    assert (
        json.loads(subprocess.run(skopeo, capture_output=True, check=True).stdout)["Digest"]
        == shown["Target"]["digest"]
    )
    assert wherry.run("images", "tags", *user, target.rpartition(":")[0]).stdout == "v2\n"
    assert (
        "authorization failed" in wherry.run("images", "tags", "--plain-http", target.rpartition(":")[0], code=1).stderr
    )
    assert set(wherry.run("content", "ls", "-q").stdout.split()) <= set(before.split())
    local = json.loads(wherry.run("images", "inspect", BUSYBOX).stdout)
    assert local["Images"][0]["Config"] == shown["Images"][0]["Config"]


def test_a_credential_helper(wherry: Wherry, locked_registry: str, tmp_path: Path) -> None:
    """credHelpers before credsStore before auths; an identity token is what a helper gives to the user `<token>`."""
    name = f"{locked_registry}/helped/box:1"
    log = tmp_path / "log"
    for helper, secret in {"good": PASSWORD, "wrong": "wrong"}.items():
        program = tmp_path / f"docker-credential-{helper}"
        program.write_text(
            f'#!/bin/sh\nread server\necho "{helper} $1 $server" >>{log}\n'
            f'echo \'{{"ServerURL": "x", "Username": "{USER}", "Secret": "{secret}"}}\'\n'
        )
        program.chmod(0o755)
    env = {"DOCKER_CONFIG": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    config = tmp_path / "config.json"
    wherry.run("images", "tag", BUSYBOX, name)
    try:
        config.write_text(json.dumps({"credHelpers": {locked_registry: "good"}, "credsStore": "wrong"}))
        wherry.run("push", "-q", "--plain-http", name, env=env)
        assert log.read_text() == f"good get {locked_registry}\n"
        config.write_text(json.dumps({"credsStore": "good"}))
        wherry.run("pull", "-q", "--plain-http", name, env=env)
        config.write_text(json.dumps({"credsStore": "missing"}))
        assert "docker-credential-missing" in wherry.run("pull", "-q", "--plain-http", name, env=env, code=1).stderr
    finally:
        wherry.run("images", "rm", name)


def test_skopeos_image_is_pulled(wherry: Wherry, registry: str, tmp_path: Path) -> None:
    """Docker's schema 2, and OCI with zstd, as skopeo pushes them."""
    archive = tmp_path / "box.tar"
    busybox.write_archive(archive)
    for tag, options in {"v2s2": ["--format=v2s2"], "zstd": ["--format=oci", "--dest-compress-format=zstd"]}.items():
        name = f"{registry}/skopeos/box:{tag}"
        command = [need("skopeo"), "copy", "-q", "--dest-tls-verify=false", *options, f"oci-archive:{archive}:test"]
        subprocess.run([*command, f"docker://{name}"], check=True, capture_output=True)
        wherry.run("pull", "-q", "--plain-http", name)
        assert wherry.run("run", "--rm", name, "echo", tag).stdout == f"{tag}\n"
        wherry.run("images", "rm", "--sync", name)


def test_by_digest_and_by_platform(wherry: Wherry, registry: str) -> None:
    other = parse("linux/s390x") if host().architecture != "s390x" else parse("linux/amd64")
    first, second = make_image([tar({"a": b"here"})]), make_image([tar({"a": b"there"})], other)
    index = make_index([first, second])
    name = f"{registry}/which/one:v1"
    asyncio.run(publish(index, name))
    repository = name.rpartition(":")[0]
    by_digest = f"{repository}@{index.target.digest}"
    assert wherry.run("pull", "-q", "--plain-http", by_digest).stdout == f"{by_digest}\n"
    assert name not in wherry.run("images", "ls", "-q").stdout
    layers = [
        next(str(d.digest) for d, _ in image.blobs.values() if "layer" in d.media_type) for image in (first, second)
    ]
    assert [digest in wherry.run("content", "ls", "-q").stdout for digest in layers] == [True, False]
    wherry.run("images", "rm", "--sync", by_digest)
    wherry.run("pull", "-q", "--plain-http", "--platform", str(other), "--no-unpack", name)
    assert [digest in wherry.run("content", "ls", "-q").stdout for digest in layers] == [False, True]
    # what is here of it can be converted, by its platform; what isn't can't
    wherry.run("images", "convert", "--platform", str(other), "--zstd", name, f"{repository}:z")
    shown = json.loads(wherry.run("images", "inspect", f"{repository}:z").stdout)
    assert shown["Images"][0]["Platform"] == str(other)
    assert "not found" in wherry.run("images", "convert", "--zstd", name, f"{repository}:y", code=1).stderr
    wherry.run("pull", "-q", "--plain-http", "--all-platforms", "--no-unpack", name)
    wherry.run("images", "convert", "--all-platforms", "--zstd", "-q", name, f"{repository}:all")
    wherry.run("push", "-q", "--plain-http", f"{repository}:all")
    skopeo = [need("skopeo"), "inspect", "--raw", "--tls-verify=false", f"docker://{repository}:all"]
    pushed = json.loads(subprocess.run(skopeo, capture_output=True, check=True).stdout)
    assert [item["platform"]["architecture"] for item in pushed["manifests"]] == [
        host().architecture,
        other.architecture,
    ]
    wherry.run("images", "rm", "--sync", name, f"{repository}:z", f"{repository}:all")


def test_containerd_2_moves_images_for_us(registry: str) -> None:
    """The same commands over the transfer service of sid's containerd; what only wherryd has says so."""
    name = f"{registry}/sid/box:v1"
    asyncio.run(publish(make_image([tar({"a": b"x" * 5000})]), name))
    containerd = Containerd(need_sid("containerd"))
    try:
        containerd.start()
        wherry = Wherry(containerd.address)
        assert re.search(r"layer-sha256:\w{12} +(done|extracted)", wherry.run("pull", "--plain-http", name).stderr)
        wherry.run("images", "convert", "-q", "--zstd", name, f"{registry}/sid/box:z")
        wherry.run("push", "-q", "--plain-http", f"{registry}/sid/box:z")
        denied = wherry.run("images", "tags", "--plain-http", f"{registry}/sid/box", code=1)
        assert "as wherryd does" in denied.stderr
    finally:
        containerd.close()


@pytest.mark.parametrize("config", [b"{}", b"no JSON"])
def test_artifacts(wherry: Wherry, registry: str, tmp_path: Path, config: bytes) -> None:
    """What is no image of a file system is moved like one."""
    made, name, archive = artifact(config), f"{registry}/artifacts/thing:v1", str(tmp_path / "thing.tar")
    asyncio.run(publish(made, name))
    assert "unknown-sha256" in wherry.run("pull", "--plain-http", name).stderr
    listed = wherry.run("images", "ls")
    assert name in listed.stdout
    assert listed.stderr == ""
    wherry.run("images", "export", archive, name)
    wherry.run("images", "rm", "--sync", name)
    wherry.run("images", "import", archive)
    wherry.run("push", "-q", "--plain-http", f"{registry}/artifacts/thing:v2", name)
    wherry.run(
        "images", "copy", "-q", "--plain-http", f"{registry}/artifacts/thing:v2", f"{registry}/artifacts/other:v1"
    )
    digest = json.loads(wherry.run("images", "inspect", name).stdout)["Target"]["digest"]
    skopeo = [need("skopeo"), "inspect", "--raw", "--tls-verify=false", f"docker://{registry}/artifacts/other:v1"]
    raw = subprocess.run(skopeo, capture_output=True, check=True).stdout
    assert digest == f"sha256:{hashlib.sha256(raw).hexdigest()}" == str(made.target.digest)
    wherry.run("images", "rm", "--sync", name)
