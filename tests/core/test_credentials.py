"""What `docker login` left behind."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from wherry.core.credentials import Credential, from_docker_config
from wherry.core.errors import InvalidArgument, PermissionDenied


def test_dockers_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread h\n[ "$h" = helped.example ] || { echo credentials not found; exit 1; }\n'
                      'echo \'{"ServerURL":"x","Username":"<token>","Secret":"s"}\'\n')  # fmt: skip
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = {
        "auths": {
            "https://index.docker.io/v1/": {"auth": base64.b64encode(b"me:pass:word").decode()},
            "r.example:5000": {"identitytoken": "tok"},
            "https://old.example/v1/": {"username": "u", "password": "p"},
        },
        "credHelpers": {"helped.example": "test"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    find = from_docker_config(str(tmp_path / "config.json"))
    assert find("docker.io") == Credential("me", "pass:word")
    assert find("registry-1.docker.io") == Credential("me", "pass:word")
    assert find("old.example") == Credential("u", "p")
    assert find("r.example:5000") == Credential(refresh_token="tok")
    assert find("helped.example") == Credential(refresh_token="s")
    assert find("other.example") is None
    assert from_docker_config(str(tmp_path / "absent.json"))("docker.io") is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidArgument, match=r"config\.json"):
        find("docker.io")
    for text in ('{"auths": [1]}', '{"auths": {"docker.io": {"auth": "%"}}}', "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidArgument, match=r"config\.json: "):
            find("docker.io")
    (tmp_path / "config.json").write_text('{"credsStore": "none-such"}')
    with pytest.raises(PermissionDenied, match="docker-credential-none-such: No such file"):
        find("docker.io")
