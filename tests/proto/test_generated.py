"""What is committed is what `proto/generate.py` makes, and it says what the field's wire contract says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wherry.proto import generate

HERE = Path(__file__).resolve().parents[2]
SHARED = HERE.parent / "shared" / "wire"


def test_the_committed_code_is_the_generated_code(tmp_path: Path) -> None:
    written = {path.name: path.read_bytes() for path in generate.generate(tmp_path)}
    committed = {path.name: path.read_bytes() for path in sorted((HERE / "proto").glob("*_pb2.py*"))}
    assert written.keys() == committed.keys()
    assert [name for name in written if written[name] != committed[name]] == []


def test_the_wire_facts_hold(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the lists of wire facts are not part of the repository")
    compiled = tmp_path / "set"
    names = sorted(f"wherry/proto/{path.name}" for path in (HERE / "proto").glob("*.proto"))
    generate.protoc(
        f"-Iwherry/proto={HERE / 'proto'}",
        "--include_imports",
        f"--descriptor_set_out={compiled}",
        *names,
        cwd=tmp_path,
    )
    facts = [str(SHARED / name) for name in ("containerd.txt", "cgroups.txt", "ttrpc.txt", "cri.txt")]
    result = subprocess.run(
        [sys.executable, str(SHARED / "facts.py"), "check", str(compiled), *facts], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
