"""Quadlet files as services: what is written, what systemd says to it, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from wherry.systemd.install import install, units
from wherry.systemd.quadlet import convert, find, folders, generate, load
from wherry.systemd.unitfile import UnitError, UnitFile, quote

WEB = """\
# a comment
[Unit]
Description=The web
After=data-volume.service

[Container]
Image=docker.io/library/nginx:1
ContainerName=web
PublishPort=8080:80
PublishPort=127.0.0.1:8443:443
Environment=A=b "C=d e"
Environment=F=$x
Volume=data.volume:/data:ro
Volume=/srv:/srv
Network=back.network
User=1000
Group=100
NoNewPrivileges=true
ReadOnly=yes
AddCapability=NET_ADMIN SYS_TIME
Exec=nginx -g 'daemon off;' \\
  -e stderr

[Service]
Restart=always

[Install]
WantedBy=multi-user.target
"""


def files(folder: Path, **texts: str) -> dict[str, UnitFile]:
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)
    return {name: load(path) for name, path in find([str(folder)]).items()}


def exec_start(service: UnitFile) -> str:
    return service.last("Service", "ExecStart")


def test_a_container_with_its_volume_and_network(tmp_path: Path) -> None:
    all_ = files(
        tmp_path, web_container=WEB, data_volume="[Volume]\nLabel=a=b\n", back_network="[Network]\nInternal=on\n"
    )
    service = convert("web.container", "/etc/web.container", all_, "/opt/wherry")
    assert exec_start(service) == (
        "/opt/wherry run --name web --rm --log-driver none --cap-add NET_ADMIN --cap-add SYS_TIME "
        '--env A=b --env "C=d e" --env F=$$x --publish 8080:80 --publish 127.0.0.1:8443:443 --read-only '
        "--user 1000:100 --security-opt no-new-privileges --volume systemd-data:/data:ro --volume /srv:/srv "
        '--network systemd-back docker.io/library/nginx:1 nginx -g "daemon off;" -e stderr'
    )
    assert service.all("Unit", "Requires") == ["data-volume.service", "back-network.service"]
    assert service.last("Service", "Restart") == "always"
    assert "X-Container" in service.sections
    assert "Container" not in service.sections
    volume = convert("data.volume", "/etc/data.volume", all_, "/opt/wherry")
    assert "volume create --label a=b systemd-data" in exec_start(volume)
    network = convert("back.network", "/etc/back.network", all_, "/opt/wherry")
    assert "network create --internal systemd-back" in exec_start(network)


def test_the_generator_as_systemd_calls_it(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    target.mkdir()
    files(
        source, web_container=WEB, data_volume="[Volume]\n", back_network="[Network]\n", bad_container="[Container]\n"
    )
    (source / "web.container.d").mkdir()
    (source / "web.container.d/10.conf").write_text("[Container]\nPublishPort=\nPublishPort=9:9\n")
    install(["--generators", str(tmp_path)])
    program = tmp_path / "etc/systemd/system-generators/wherry-system-generator"
    done = subprocess.run(
        [program, target, target, target],
        env={"QUADLET_UNIT_DIRS": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == f"wherry generator: {source}/bad.container: [Container] Image= is missing\n"
    assert sorted(os.listdir(target)) == [
        "back-network.service", "data-volume.service", "multi-user.target.wants", "web.service",
    ]  # fmt: skip
    assert os.readlink(target / "multi-user.target.wants/web.service") == "../web.service"
    text = (target / "web.service").read_text()
    assert "--publish 9:9" in text
    assert "8080" not in text.partition("[X-Container]")[0]
    assert f"SourcePath={source}/web.container" in text
    if shutil.which("systemd-analyze"):
        checked = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *map(str, target.glob("*.service"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        # what it says of units of this host, and of commands that aren't installed there, isn't about ours
        about = [line for line in checked.stderr.splitlines() if str(target) in line and "not executable" not in line]
        assert about == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[Container]\nImage=a\nRootfs=/x\n", r"\[Container\] Rootfs: not supported"),
        ("[Container]\nImage=a\nVolume=no.volume:/x\n", "no.volume: there is no such file"),
        ("[Container]\nImage=a\nGroup=1\n", "Group= needs User="),
        ("[Container]\nImage=a\nReadOnly=perhaps\n", "ReadOnly=perhaps: expected yes or no"),
        ("[Service]\nType=exec\n", r"no section \[Container\]"),
        ("[Container]\nImage=a\nExec='open\n", "Exec: No closing quotation"),
    ],
)
def test_what_can_not_be_done_is_said(tmp_path: Path, text: str, message: str) -> None:
    all_ = files(tmp_path, a_container=text)
    with pytest.raises(UnitError, match=message):
        convert("a.container", "/a", all_, "wherry")


def test_a_broken_file_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.container").write_text("nonsense")
    (tmp_path / "in/b.container").write_text("[Container]\nImage=b\n")
    said: list[str] = []
    assert generate(str(tmp_path), [str(tmp_path / "in")], "wherry", said.append) == 1
    assert (tmp_path / "b.service").exists()
    assert said == [f"{tmp_path}/in/a.container: line 1: no section before 'nonsense'"]


def test_where_the_files_are() -> None:
    assert folders(user=False, environment={})[:2] == ["/etc/wherry/systemd", "/etc/containers/systemd"]
    mine = folders(user=True, environment={"XDG_CONFIG_HOME": "/home/me/c"})
    assert mine[:2] == ["/home/me/c/wherry/systemd", "/home/me/c/containers/systemd"]
    assert f"/etc/containers/systemd/users/{os.getuid()}" in mine


def test_words_of_a_unit() -> None:
    assert quote("plain") == "plain"
    assert quote("") == '""'
    assert quote('a "b" $c \\ %n') == '"a \\"b\\" $$c \\\\ %n"'


def test_the_units_of_a_user() -> None:
    texts = units(user=True)
    service, socket = texts["wherryd.service"], texts["wherryd.socket"]
    assert "WantedBy=default.target" in service
    assert "OOMScoreAdjust" not in service
    assert "ListenStream=%t/wherry/wherryd.sock\n" in socket
    assert "Delegate=yes" in service
