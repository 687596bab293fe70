"""The units that are installed; `tests/vm` runs them under a real systemd."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wherry.systemd import install as installer
from wherry.systemd.install import InstallError, install, units


def exec_start(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("ExecStart="))


def test_the_paths_are_absolute_and_those_of_this_environment() -> None:
    texts = units()
    command = exec_start(texts["wherryd.service"]).removeprefix("ExecStart=")
    assert command.split()[0] in {str(Path(sys.executable).with_name("wherryd")), str(Path(sys.executable).absolute())}
    assert "@" not in "".join(line for text in texts.values() for line in text.splitlines() if line[:1] != "#")
    assert (
        "ListenStream=/run/wherry/wherryd.sock\nListenStream=/run/wherry/wherryd.sock.ttrpc\n"
        in texts["wherryd.socket"]
    )


def test_a_script_beside_the_interpreter_is_what_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "wherryd"
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert exec_start(units()["wherryd.service"]) == f"ExecStart={script}"


def test_the_daemons_flags_are_quoted() -> None:
    flags = ["--config", '/etc/my "own" 100%/$HOME.toml', "--address=/run/x y.sock"]
    texts = units(flags)
    assert exec_start(texts["wherryd.service"]).endswith(
        ' --config "/etc/my \\"own\\" 100%%/$$HOME.toml" "--address=/run/x y.sock"'
    )
    assert "ListenStream=/run/x y.sock\nListenStream=/run/x y.sock.ttrpc\n" in texts["wherryd.socket"]


@pytest.mark.parametrize("flags", [["--address", "relative.sock"], ["--address"], ["--config", "a\nb"]])
def test_flags_that_cant_be_are_refused(flags: list[str]) -> None:
    with pytest.raises(InstallError):
        units(flags)


def test_the_daemon_gets_no_mount_namespace_of_its_own() -> None:
    """A restarted daemon would not see the mounts of the containers that went on."""
    options = {line.partition("=")[0] for line in units()["wherryd.service"].splitlines() if line[:1] != "#"}
    assert {"Type", "Delegate", "KillMode", "Restart", "OOMScoreAdjust"} <= options
    prefixes = ("Private", "Protect", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary", "Mount", "Root")
    assert not [option for option in options if option.startswith(prefixes)]


def test_files_are_written_where_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "units"
    assert install(["--dir", str(folder), "--", "--log-level", "debug"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["wherryd.service", "wherryd.socket"]
    assert exec_start((folder / "wherryd.service").read_text()).endswith(" --log-level debug")
    assert f"wrote {folder}/wherryd.service" in capsys.readouterr().out
    assert install(["--dir", str(folder), "--remove"]) == 0
    assert list(folder.iterdir()) == []


def test_without_systemd_starting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installer, "_BOOTED", str(tmp_path / "none"))
    assert install(["--dir", str(tmp_path / "units"), "--now"]) == 1
    assert "systemd doesn't run this machine" in capsys.readouterr().err
    assert not (tmp_path / "units").exists()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is missing: apt-get install systemd")
def test_systemd_understands_them(tmp_path: Path) -> None:
    assert install(["--dir", str(tmp_path), "--", "--config", "/etc/a b.toml"]) == 0
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in units())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "wherryd" in line]) == (0, [])
