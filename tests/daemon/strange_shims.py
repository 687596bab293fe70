"""Shims that start, answer or speak in ways no package here has: our own shim behind a script that changes its words.

Each is a program for `[runtimes.NAME]`; behind all of them is `containerd-shim-wherry-v1`, so what runs is real.
"""

from __future__ import annotations

import sys
from pathlib import Path

HEAD = f"""#!{sys.executable}
import json, os, subprocess, sys
OURS = [{sys.executable!r}, "-I", "-c", "from wherry.shim.bootstrap import main; main()", *sys.argv[1:]]
CHECKOUT = {str(Path(__file__).resolve().parents[2])!r}
"""
WORDS = """
def parse(data):
    "The fields of a protobuf message: {number: [value, ...]}; raises where it is none."
    fields, at = {}, 0
    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]; at += 1
            value |= (byte & 0x7F) << shift; shift += 7
            if byte < 0x80:
                return value
    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        elif tag & 7 == 2:
            length = varint(); value = data[at:at + length]; at += length
            if len(value) != length: raise ValueError
        else:
            raise ValueError
        fields.setdefault(tag >> 3, []).append(value)
    return fields

def field(number, value):
    return bytes([number << 3 | 2, len(value)]) + value

starting = sys.argv[-1] == "start"
given = sys.stdin.buffer.read() if starting else b""
named = sys.argv[sys.argv.index("-id") + 1].encode()
if starting:
    with open("../../../stdin-" + named.decode(), "wb") as file:  # in the daemon's state
        file.write(given)
"""

# containerd 1.6's shims: the bare address, whatever the daemon could take
ADDRESS = """
os.environ.pop("MAX_SHIM_VERSION")
sys.exit(subprocess.run(OURS, input=given).returncode)
"""

# containerd 2.3.0's: takes the old words, answers in the new ones
RESULT = """
done = subprocess.run(OURS, input=given, stdout=subprocess.PIPE)
if starting and not done.returncode:
    said = json.loads(done.stdout)
    done.stdout = bytes([8, said["version"]]) + field(2, said["address"].encode()) + field(3, b"ttrpc")
sys.stdout.buffer.write(done.stdout)
sys.exit(done.returncode)
"""

# those after 2.3.3: refuse the old words before they do anything
PARAMS = """
if starting:
    try:
        fields = parse(given)
    except (ValueError, IndexError):
        fields = {}
    if fields.get(1) != [named]:
        sys.exit("shim start: no bootstrap parameters on stdin: is the daemon older than this shim?")
sys.exit(subprocess.run(OURS, input=given).returncode)
"""

# one that listens for gRPC
GRPC = """
if not starting:
    sys.exit(subprocess.run(OURS).returncode)
said = json.loads(subprocess.run(OURS, input=given, stdout=subprocess.PIPE, check=True).stdout)
address = "unix://" + os.getcwd() + "/grpc.sock"
ready, tell = os.pipe()
proxy = subprocess.Popen(
    [sys.executable, "-m", "tests.daemon.grpc_proxy", said["address"], address, str(tell)],
    pass_fds=[tell], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(os.getcwd() + "/proxy.log", "w"),
    start_new_session=True, cwd=CHECKOUT,
)
os.close(tell)
os.read(ready, 1)
print(json.dumps({"version": 3, "address": address, "protocol": "grpc"}))
"""

# one that takes four seconds to leave, as one does whose last events the daemon is too busy to confirm
LINGERS = """
OURS[3] = '''
import os
from wherry.shim import serving
from wherry.shim.bootstrap import main
end = serving.Life._end
async def late(life):
    await life.loop.sleep(4)
    await end(life)
    open(os.getcwd() + "/../../../left", "w").close()
serving.Life._end = late
main()
'''
sys.exit(subprocess.run(OURS, input=given).returncode)
"""

# one of tomorrow
NEWER = """
print(json.dumps({"version": 4, "address": "unix:///nowhere", "protocol": "ttrpc"}))
"""

# one that has nothing to say
SILENT = ""

# one that fails, with something to say
FAILS = """
sys.exit("the moon is in the wrong phase")
"""

KINDS = {
    "address": ADDRESS,
    "result": RESULT,
    "params": PARAMS,
    "grpc": GRPC,
    "lingers": LINGERS,
    "newer": NEWER,
    "silent": SILENT,
    "fails": FAILS,
}


def write(folder: Path) -> dict[str, Path]:
    """One program for each kind; their paths."""
    found = {}
    for kind, body in KINDS.items():
        path = folder / f"shim-{kind}"
        path.write_text(HEAD + WORDS + body)
        path.chmod(0o755)
        found[kind] = path
    return found
