"""An ordinary user on pure cgroup v2, with a service manager of the user's own: limits, networks, units.

The tests follow each other: first a command starts the daemon, then the manager keeps one. Each command starts an
interpreter, which takes a second here, and a daemon takes ten: processes and cgroups are looked at from outside.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.image import USER
from tests.vm.machine import Done, Machine

pytestmark = pytest.mark.timeout(600)

UID = 1000
IMAGE = "127.0.0.1:5000/busybox:test"
# the host's address, which pasta gives to containers too, and another one of the host's
CARD, OTHER = "198.51.100.9", "198.51.100.77"
_RUNTIME = f"/run/user/{UID}"
_MANAGER = f"/user.slice/user-{UID}.slice/user@{UID}.service"
_CONFIG = f"/home/{USER}/.config"

# as PAM sets a session up; `u COMMAND`
_AS_USER = f"""
cat >/usr/bin/u <<'END'
#!/bin/sh
cd / && exec setpriv --reuid={UID} --regid={UID} --init-groups env -i HOME=/home/{USER} USER={USER} \\
  XDG_RUNTIME_DIR={_RUNTIME} LANG=C.UTF-8 PATH=/opt/wherry/bin:/usr/bin:/bin:/usr/sbin:/sbin "$@"
END
chmod 755 /usr/bin/u
install -m 644 /root/busybox.tar /tmp/busybox.tar
"""
# the machine has no card, and pasta takes its addresses from the one that the default route goes by
_CARD = f"""
modprobe dummy
ip link add user0 type dummy
ip addr add {CARD}/24 dev user0
ip addr add {OTHER}/24 dev user0
ip link set user0 up
ip route add default via 198.51.100.1
"""
_REGISTRY = """
cat >/root/registry.yml <<'END'
version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}}
http: {addr: 127.0.0.1:5000}
END
systemd-run -q --unit registry docker-registry serve /root/registry.yml
"""
# a name server on the host's card, which knows one address for every name (RFC 1035)
ADDRESS = "203.0.113.7"
_NAMES = f"""
cat >/root/names.py <<'END'
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("{OTHER}", 53))
while True:
    asked, who = server.recvfrom(512)
    end = asked.index(0, 12) + 5
    found = b"\\xc0\\x0c\\0\\1\\0\\1\\0\\0\\0\\5\\0\\4" + socket.inet_aton("{ADDRESS}") if asked[end - 3] == 1 else b""
    head = asked[:2] + b"\\x81\\x80\\0\\1\\0" + bytes([bool(found)]) + bytes(4)
    server.sendto(head + asked[12:end] + found, who)
END
systemd-run -q --unit names python3 /root/names.py
test ! -e /etc/resolv.conf || mv /etc/resolv.conf /root/
echo nameserver {OTHER} >/etc/resolv.conf
"""
_COUNTER = "i=0; while true; do i=$((i+1)); echo $i >/tmp/count; usleep 100000; done"


class User:
    """What the user does in the machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __call__(self, *commands: str) -> str:
        """Commands of the user, one after the other; the output of all."""
        return self.machine.check("\n".join(f"u {command}" for command in commands), timeout=180)

    def tries(self, command: str) -> Done:
        return self.machine.run(f"u {command}", timeout=180)

    def wait(self, script: str) -> str:
        """A script of root's until it succeeds; its output."""
        return self.machine.wait(script, tell=f"journalctl _UID={UID} -n 30 --no-pager")

    def daemon(self) -> str:
        """The daemon's pid."""
        return self.machine.check(f"""sed 's/.*"pid": \\([0-9]*\\).*/\\1/' {_RUNTIME}/wherry/lock""")

    def shown(self, names: str, unit: str = "wherryd.service") -> list[str]:
        """Properties of a unit of the user's manager, in the order of systemd's own."""
        words = " ".join(f"-p {name}" for name in names.split())
        return self(f"systemctl --user show --value {words} {unit}").split("\n")


@pytest.fixture(scope="module")
def user(machine: Machine) -> Iterator[User]:
    """The user with a manager that goes on without a login; a network card, and a registry without images."""
    machine.check(f"{_AS_USER}{_CARD}{_REGISTRY}{_NAMES}loginctl enable-linger {USER}")
    user = User(machine)
    user.wait(f"test -S {_RUNTIME}/systemd/private")
    yield user
    machine.run(f"loginctl disable-linger {USER}; systemctl stop user@{UID}; rm -rf {_CONFIG}", timeout=120)
    machine.wait(f"! test -e {_RUNTIME}")
    machine.run(
        "systemctl stop registry names; ip link del user0; rm -r /var/lib/registry /etc/resolv.conf;"
        "test ! -e /root/resolv.conf || mv /root/resolv.conf /etc/"
    )


@pytest.fixture(scope="module")
def keeper(user: User) -> str:
    """A container that counts up in a file of its own, through whatever happens to its daemons; its pid."""
    user(f"wherry run -d --name keeper --net none -m 32m {IMAGE} sh -c '{_COUNTER}'")
    look = "for p in $(pgrep -f '^sh -c i=0'); do grep -qs :/user.slice /proc/$p/cgroup && echo $p; done"
    return user.wait(f"{look} | grep .")


def goes_on(user: User, pid: str) -> None:
    """The same process is known to the daemon, alive, counts on, and takes an exec."""
    count = f"cat /proc/{pid}/root/tmp/count"
    before = user.wait(f"{count} | grep .")  # the file is empty for a moment each time
    assert user("wherry exec keeper cat /sys/fs/cgroup/memory.max") == str(32 << 20)
    user.wait(f"test 0$({count}) -gt {before}")


# -- nothing installed ------------------------------------------------------------------------------------------------


def test_the_main_job_with_nothing_configured(user: User) -> None:
    """Push to a registry, pull from there, run, exit code, exec. The first command starts the daemon."""
    user("wherry images import /tmp/busybox.tar", f"wherry tag busybox:test {IMAGE}", f"wherry push {IMAGE}")
    done = user.tries(f"wherry run --rm --pull always --net none {IMAGE} sh -c 'id -u; cat /proc/self/uid_map; exit 3'")
    assert done.code == 3, done.out
    assert "Completed pull from OCI Registry" in done.out
    assert done.out.split()[-7:] == ["0", "0", str(UID), "1", "1", "100000", "65536"]
    user(f"wherry run -d --name main --net none -u 7:8 {IMAGE} sleep 1007")
    assert user("wherry exec main id -u") == "7"
    assert user.machine.check("stat -c %u:%g /proc/$(pgrep -xf 'sleep 1007')") == "100006:100007"
    user("wherry rm -f main")


def test_a_daemon_that_a_command_started_is_nobody_elses_part(user: User, keeper: str) -> None:
    """It has a scope of the user's manager, so that it ends with no session or service that the command was in."""
    daemon = user.daemon()
    assert user.machine.check(f"cat /proc/{daemon}/cgroup") == f"0::{_MANAGER}/app.slice/wherryd-{daemon}.scope"
    container = user.machine.check(f"cat /proc/{keeper}/cgroup")
    assert container.startswith(f"0::{_MANAGER}/app.slice/wherry-containers-")
    assert container.split("/")[-2] == "default"


def test_limits_hold_and_change(user: User, keeper: str) -> None:
    limits = "-m 24m --memory-swap 24m --cpus 0.5 --pids-limit 12"
    # the last one is one too many
    script = (
        "cd /sys/fs/cgroup; cat memory.max memory.swap.max cpu.max pids.max; tail /dev/zero; echo $?;"
        "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 100 & done; echo all"
    )
    done = user.tries(f"wherry run --rm --net none {limits} {IMAGE} sh -c '{script}'")
    words = done.out.split()
    assert words[:5] == [str(24 << 20), "0", "50000", "100000", "12"], done.out
    assert "137" in words
    assert "can't fork" in done.out
    assert "all" not in words
    user("wherry update --pids-limit 50 keeper")
    place = "/sys/fs/cgroup" + user.machine.check(f"cut -d: -f3 /proc/{keeper}/cgroup")
    assert user.machine.check(f"cat {place}/pids.max") == "50"


def test_networks_and_ports(user: User) -> None:
    serve = "echo works >/tmp/index.html; httpd -f -p 80 -h /tmp"
    user(f"wherry run -d --name web -p 8080:80 {IMAGE} sh -c '{serve}'")
    for address in ("127.0.0.1", CARD):
        user.wait(f"busybox wget -qO- http://{address}:8080/index.html | grep works")
    # out of the container, to a server on the host's card, and to a name server there
    user.machine.check(f"mkdir -p /tmp/www && echo outside >/tmp/www/f && busybox httpd -p {OTHER}:8081 -h /tmp/www")
    try:
        out = user(f"wherry exec web sh -c 'wget -qO- http://{OTHER}:8081/f; nslookup some.where.test'")
        assert out.startswith("outside\n")
        assert ADDRESS in out
    finally:
        user.machine.run(f"pkill -f 'busybox [h]ttpd -p {OTHER}'")
        user("wherry rm -f web")
    user.wait("! pgrep -f '[-]t 8080:80'")


def test_doctor(user: User) -> None:
    out = user("wherry doctor")
    lines = {line.split()[0]: line for line in out.splitlines() if line[:1].isalpha()}
    assert "cpu, memory, pids" in lines["limits"]
    assert "containers go on after the last logout" in lines["lingering"]
    assert "65536 besides one's own" in lines["ids"]
    assert "Containers can run here." in out


# -- the manager keeps the daemon -------------------------------------------------------------------------------------


def test_the_service_takes_over_and_comes_back_after_sigkill(user: User, keeper: str) -> None:
    """A command's daemon makes way for the one that the manager keeps; all of them drive the same container."""
    first = user.daemon()
    user("wherryd systemd install --user --now")
    second = user.daemon()
    assert second != first
    assert user.shown("MainPID StatusText ActiveState") == [second, "serving", "active"]
    user.machine.check(f"kill -9 {second}")
    # nobody starts another one meanwhile: the command waits for the manager's
    goes_on(user, keeper)
    assert user.shown("MainPID") == [user.daemon()] != [second]
    assert user.machine.check(f"cat /sys/fs/cgroup{_MANAGER}/app.slice/wherryd.service/cgroup.subtree_control") == ""
    user("wherry rm -f keeper")
    assert user.machine.run(f"test -e /proc/{keeper}").code == 1


def test_a_container_as_a_unit(user: User) -> None:
    """`wherry generate unit`: systemd starts it, sees its output and its end, and starts it again."""
    script = 'trap "exit 0" TERM; echo begins; while ! test -e /tmp/go; do usleep 100000; done; rm /tmp/go; exit 5'
    said = "journalctl _SYSTEMD_USER_UNIT=container-job.service --no-pager -o cat | grep -c begins | grep -q"
    user(
        f"wherry create --name job --net none {IMAGE} sh -c '{script}'",
        f"sh -c 'mkdir -p {_CONFIG}/systemd/user && cd {_CONFIG}/systemd/user"
        " && wherry generate unit --files --restart-policy on-failure job'",
        "systemctl --user daemon-reload",
        "systemctl --user start container-job",
    )
    user.wait(f"{said} 1")
    user("wherry exec job touch /tmp/go")
    user.wait(f"{said} 2")
    assert user.shown("NRestarts", "container-job") == ["1"]
    user("systemctl --user stop container-job")
    assert user("wherry inspect -f '{{.State.Status}}' job") == "exited"
    user("wherry rm job")


_WEB = f"""[Unit]
Description=The web
[Container]
Image={IMAGE}
ContainerName=quad
Volume=data.volume:/data
Network=none
Memory=32m
StopTimeout=1
Environment=A=b "C=d e"
Exec=sh -c 'echo "$C" >>/data/log; cat /data/log; while ! test -e /tmp/go; do usleep 100000; done; exit 4'
[Service]
Restart=on-failure
RestartSec=100ms
[Install]
WantedBy=default.target
"""


def test_quadlet_files(user: User) -> None:
    """A container with a volume, by the generator, under the user's manager."""
    user.machine.check("wherryd systemd install --generators")
    place = f"{_CONFIG}/containers/systemd"
    user.machine.check(
        f"mkdir -p {place}; printf '[Volume]\\n' >{place}/data.volume; cat >{place}/web.container <<'END'\n{_WEB}END\n"
        f"chown -R {USER}: {_CONFIG}"
    )
    user("systemctl --user daemon-reload")
    assert "web.service" in user.shown("Wants", "default.target")[0].split()
    assert user.shown("SourcePath", "web.service") == [f"{place}/web.container"]
    user("systemctl --user start web")
    said = "journalctl _SYSTEMD_USER_UNIT=web.service --no-pager -o cat"
    user.wait(f"{said} | grep -c '^d e$' | grep -qx 1")
    assert user("wherry exec quad sh -c 'cat /sys/fs/cgroup/memory.max; touch /tmp/go'") == str(32 << 20)
    # what the first one wrote into the volume is there for the second: one line, and then two
    user.wait(f"{said} | grep -c '^d e$' | grep -qx 3")
    assert user.shown("NRestarts", "web") == ["1"]
    user("systemctl --user stop web data-volume", "wherry volume rm systemd-data")
    assert user("wherry ps -aq") == ""
    user.machine.check(f"rm -r {place}; wherryd systemd install --generators --remove")
    user("systemctl --user daemon-reload")
    assert user.shown("LoadState", "web.service") == ["not-found"]


# -- at last: the user goes, and comes back ---------------------------------------------------------------------------


def test_without_lingering_all_ends_with_the_last_logout(user: User) -> None:
    script = 'trap "exit 0" TERM; sleep 1008 & wait'
    user(
        f"wherry run -d --name last --net none --restart no {IMAGE} sh -c '{script}'",
        "wherryd systemd install --user --enable",
    )
    user.machine.check(f"loginctl disable-linger {USER}; systemctl stop user@{UID}", timeout=120)
    user.wait(f"! pgrep -U {UID} && ! test -e {_RUNTIME}")
    assert user.machine.run(f"test -e /sys/fs/cgroup/user.slice/user-{UID}.slice").code == 1
    # as at boot
    user.machine.check(f"loginctl enable-linger {USER}")
    user.wait("u systemctl --user is-active wherryd")
    assert user("wherry ps -q") == ""
    user("wherry start last")
    assert user("wherry exec last echo back") == "back"
    user("wherry rm -f last", "wherryd systemd install --user --remove")
    assert user.machine.run(f"ls {_RUNTIME}/wherry/wherryd.sock {_CONFIG}/systemd/user/wherryd.*").code
