"""A user's folders: below what the environment names, else in a folder of /tmp that nobody else could have made."""

from __future__ import annotations

from pathlib import Path

import pytest

from wherry.core import places
from wherry.core.errors import PermissionDenied


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    assert places.private(str(folder)) == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert places.private(str(folder)) == str(folder)
    folder.chmod(0o777)
    with pytest.raises(PermissionDenied, match="belongs to somebody else, or others may write there"):
        places.private(str(folder))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PermissionDenied):
        places.private(str(folder))


def test_whose_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(places.INSIDE, raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert (places.root(), places.address()) == ("/var/lib/wherry", "/run/wherry/wherryd.sock")
    monkeypatch.setenv(places.INSIDE, "1000")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("XDG_DATA_HOME", "/home/me/data")
    assert (places.root(), places.address()) == ("/home/me/data/wherry", "/run/user/1000/wherry/wherryd.sock")
