"""Generate the `_pb2` modules and their type stubs from the `.proto` files beside this file (`make proto`).

`rpc_status.proto` describes `google.rpc.Status`, so that our files stand alone. In the generated code that
message comes from googleapis-common-protos instead: protobuf keeps one pool of names for each process, and a
second definition of the same message would break every program that also uses grpcio-status or a Google library.

No `_pb2_grpc` modules are made: both doors (gRPC and ttrpc) are driven by the descriptors, see `service.py`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2

HERE = Path(__file__).resolve().parent
PREFIX = "wherry/proto/"
# our file, and the one of googleapis-common-protos that holds the same message
SHARED = {f"{PREFIX}rpc_status.proto": "google/rpc/status.proto"}


def protoc(*arguments: str, cwd: Path) -> None:
    """Run the protoc that grpcio-tools brings; its messages go to our stderr."""
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True, cwd=cwd)


def generate(out: Path) -> list[Path]:
    """Write the generated modules into the folder `out` and return their paths, sorted."""
    names = sorted(PREFIX + path.name for path in HERE.glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        protoc(f"-I{PREFIX}={HERE}", "--include_imports", "--descriptor_set_out=set", *names, cwd=work)
        descriptors = descriptor_pb2.FileDescriptorSet.FromString((work / "set").read_bytes())
        for file in descriptors.file:
            file.name = SHARED.get(file.name, file.name)
            for index, dependency in enumerate(file.dependency):
                file.dependency[index] = SHARED.get(dependency, dependency)
        (work / "set").write_bytes(descriptors.SerializeToString())
        ours = [name for name in names if name not in SHARED]
        protoc("--descriptor_set_in=set", "--python_out=.", "--pyi_out=.", *ours, cwd=work)
        written = []
        for path in sorted((work / PREFIX).glob("*_pb2.py*")):
            target = out / path.name
            # protoc's stubs leave the mappings generic, which mypy's strict mode refuses
            target.write_text(path.read_text().replace("_Mapping]", "_Mapping[str, object]]"))
            written.append(target)
    return written


if __name__ == "__main__":
    generate(HERE)
