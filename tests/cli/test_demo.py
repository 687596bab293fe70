"""The demo and what it is made of: ELF headers, an image of the host, an embedded daemon."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from wherry.cli import elf, host_image
from wherry.core.errors import InvalidArgument, NotFound


def test_the_demo_shows_every_step() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wherry.cli.demo"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every step came out as it should" in done.stdout


def test_libraries_are_those_that_the_loader_finds() -> None:
    program = host_image.locate("ls")
    found = elf.Libraries().needs(program)
    ldd = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    expected = {os.path.realpath(word) for word in ldd.split() if word.startswith("/")}
    assert {os.path.realpath(path) for path in found[1:]} == expected


def test_what_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"#!/bin/sh\n" * 10)
    with pytest.raises(InvalidArgument, match="isn't an ELF file"):
        elf.read(str(path))
    path.write_bytes(b"\x7fELF\x02\x01" + b"\xff" * 100)
    with pytest.raises(InvalidArgument, match="damaged"):
        elf.read(str(path))
    header = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 1 << 40, 0, 0, 64, 56, 3, 0, 0, 0)
    )
    path.write_bytes(header)
    with pytest.raises(InvalidArgument, match="damaged"):
        elf.read(str(path))
    with pytest.raises(NotFound):
        host_image.locate("no-such-tool")


def test_a_daemon_for_one_command(tmp_path: Path) -> None:
    archive = tmp_path / "host.tar"
    host_image.write(str(archive), "demo.local/h:1", ["sh"])
    wherry = Wherry("unused")
    where = ["--embedded", "--root", f"{tmp_path}/r", "--state", f"{tmp_path}/s"]
    base = [sys.executable, "-m", "wherry.cli", *where]
    assert subprocess.run([*base, "images", "import", str(archive)], check=False, timeout=60).returncode == 0
    done = subprocess.run(
        [*base, "run", "--rm", "--name", "one", "demo.local/h:1", "sh", "-c", "echo hi; exit 3"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("hi\n", 3)
    assert wherry.address == "unused"
    log = (tmp_path / "s/wherryd.log").read_text()
    assert log.count("serving") == 2
    with open("/proc/self/mountinfo") as file:
        assert str(tmp_path) not in file.read()


def test_a_daemon_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "wherry.cli",
        "--embedded",
        "--root",
        f"{tmp_path}/file",
        "--state",
        f"{tmp_path}/s",
        "version",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "file" in done.stderr
