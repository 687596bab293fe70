"""What every snapshotter must do, whatever it keeps its files in. Subclass and bring the fixture `snapshotter`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.snapshotter.trees import look, mounted
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.snapshotter.interface import Info, Kind, Snapshotter, Usage

Fill = Callable[[Path], None]


def layer(snapshotter: Snapshotter, where: Path, name: str, parent: str, fill: Fill) -> None:
    """Prepare on `parent`, change the tree with `fill`, commit as `name`."""
    key = f"making-{name}"
    with mounted(snapshotter.prepare(key, parent), where) as tree:
        fill(tree)
    snapshotter.commit(name, key)


def write(name: str, text: str) -> Fill:
    def fill(tree: Path) -> None:
        (tree / name).write_text(text)

    return fill


class SnapshotterSuite:
    """The conformance suite of `wherry.snapshotter.interface.Snapshotter`."""

    # lives

    def test_a_layer_is_seen_by_its_children_and_their_changes_are_their_own(
        self, snapshotter: Snapshotter, tmp_path: Path
    ) -> None:
        layer(snapshotter, tmp_path / "m", "one", "", write("a", "1"))
        layer(snapshotter, tmp_path / "m", "two", "one", write("b", "2"))
        with mounted(snapshotter.prepare("x", "two"), tmp_path / "x") as tree:
            (tree / "a").write_text("changed")
            (tree / "b").unlink()
            with mounted(snapshotter.prepare("y", "two"), tmp_path / "y") as other:
                assert (other / "a").read_text() == "1"
                assert (other / "b").read_text() == "2"
        with mounted(snapshotter.mounts("x"), tmp_path / "x") as tree:
            assert sorted(os.listdir(tree)) == ["a"]
            assert (tree / "a").read_text() == "changed"

    def test_many_layers_are_one_tree(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        for number in range(12):

            def fill(tree: Path, number: int = number) -> None:
                (tree / f"file{number}").write_text(str(number))
                (tree / "last").write_text(str(number))
                if number > 1:
                    (tree / f"file{number - 2}").unlink()

            layer(snapshotter, tmp_path / "m", f"l{number}", f"l{number - 1}" if number else "", fill)
        with mounted(snapshotter.view("v", "l11"), tmp_path / "v") as tree:
            assert sorted(os.listdir(tree)) == ["file10", "file11", "last"]
            assert (tree / "last").read_text() == "11"

    def test_a_directory_that_was_replaced_hides_the_one_below(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        def below(tree: Path) -> None:
            (tree / "d" / "sub").mkdir(parents=True)
            (tree / "d" / "old").write_text("old")

        def above(tree: Path) -> None:
            (tree / "d" / "old").unlink()
            (tree / "d" / "sub").rmdir()
            (tree / "d").rmdir()
            (tree / "d").mkdir()
            (tree / "d" / "new").write_text("new")

        layer(snapshotter, tmp_path / "m", "one", "", below)
        layer(snapshotter, tmp_path / "m", "two", "one", above)
        with mounted(snapshotter.view("v", "two"), tmp_path / "v") as tree:
            assert os.listdir(tree / "d") == ["new"]

    def test_owner_and_mode_of_the_root_pass_on_to_children(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        def fill(tree: Path) -> None:
            os.chown(tree, 1234, 4321)
            os.chmod(tree, 0o1771)

        layer(snapshotter, tmp_path / "m", "one", "", fill)
        layer(snapshotter, tmp_path / "m", "two", "one", lambda tree: None)
        with mounted(snapshotter.prepare("x", "two"), tmp_path / "x") as tree:
            status = tree.stat()
            assert (status.st_uid, status.st_gid, oct(status.st_mode & 0o7777)) == (1234, 4321, "0o1771")

    def test_all_kinds_of_files_survive_the_way_through_layers(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        def fill(tree: Path) -> None:
            (tree / "f").write_text("f")
            os.chown(tree / "f", 5, 6)
            os.chmod(tree / "f", 0o4755)
            os.link(tree / "f", tree / "g")
            os.symlink("nowhere", tree / "s")
            os.mkfifo(tree / "p")
            os.mknod(tree / "null", 0o020666, os.makedev(1, 3))
            os.setxattr(tree / "f", "user.colour", b"blue")
            with (tree / "sparse").open("wb") as file:
                file.seek(10 << 20)
                file.write(b"end")
            os.utime(tree / "f", ns=(1, 1_600_000_000_123_456_789))

        layer(snapshotter, tmp_path / "m", "one", "", fill)
        with mounted(snapshotter.view("a", "one"), tmp_path / "a") as tree:
            expected = look(tree)
        layer(snapshotter, tmp_path / "m", "two", "one", lambda tree: None)
        with mounted(snapshotter.view("b", "two"), tmp_path / "b") as tree:
            assert look(tree) == expected
            assert (tree / "sparse").stat().st_blocks < 1000

    def test_a_view_is_read_only_and_cannot_be_committed(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        layer(snapshotter, tmp_path / "m", "one", "", write("a", "1"))
        layer(snapshotter, tmp_path / "m", "two", "one", write("b", "2"))
        for parent in ("", "one", "two"):
            key = f"view-{parent}"
            with (
                mounted(snapshotter.view(key, parent), tmp_path / "v") as tree,
                pytest.raises(OSError, match="Read-only"),
            ):
                (tree / "new").write_text("x")
            assert snapshotter.stat(key).kind is Kind.VIEW
            with pytest.raises(FailedPrecondition, match="not active"):
                snapshotter.commit("never", key)
            snapshotter.remove(key)

    # records

    def test_stat_tells_kind_parent_labels_and_times(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        snapshotter.prepare("k", labels={"a": "1"})
        info = snapshotter.stat("k")
        assert (info.kind, info.name, info.parent, dict(info.labels)) == (Kind.ACTIVE, "k", "", {"a": "1"})
        assert info.created == info.updated > 0
        snapshotter.commit("n", "k", {"b": "2"})
        info = snapshotter.stat("n")
        assert (info.kind, info.name, info.parent, dict(info.labels)) == (Kind.COMMITTED, "n", "", {"b": "2"})
        snapshotter.prepare("child", "n")
        assert snapshotter.stat("child").parent == "n"
        with pytest.raises(NotFound, match="not found"):
            snapshotter.stat("k")

    def test_keys_and_names_are_one_set(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k")
        with pytest.raises(AlreadyExists, match="already exists"):
            snapshotter.prepare("k")
        with pytest.raises(AlreadyExists, match="already exists"):
            snapshotter.view("k")
        snapshotter.commit("n", "k")
        with pytest.raises(AlreadyExists, match="already exists"):
            snapshotter.prepare("n")
        snapshotter.prepare("k")
        with pytest.raises(AlreadyExists, match="committed snapshot n: already exists"):
            snapshotter.commit("n", "k")
        assert snapshotter.stat("k").kind is Kind.ACTIVE

    def test_a_parent_must_be_there_and_committed(self, snapshotter: Snapshotter) -> None:
        for make in (snapshotter.prepare, snapshotter.view):
            with pytest.raises(NotFound, match="not found"):
                make("k", "missing")
        snapshotter.prepare("active")
        with pytest.raises(InvalidArgument, match="is not committed"):
            snapshotter.prepare("k", "active")
        with pytest.raises(NotFound):
            snapshotter.stat("k")

    def test_what_does_not_exist_is_not_found(self, snapshotter: Snapshotter) -> None:
        calls: list[Callable[[], object]] = [
            lambda: snapshotter.stat("none"),
            lambda: snapshotter.usage("none"),
            lambda: snapshotter.mounts("none"),
            lambda: snapshotter.remove("none"),
            lambda: snapshotter.commit("n", "none"),
            lambda: snapshotter.update(Info(Kind.UNKNOWN, "none")),
        ]
        for call in calls:
            with pytest.raises(NotFound, match="not found"):
                call()

    def test_a_committed_snapshot_has_no_mounts_and_is_not_committed_again(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k")
        snapshotter.commit("n", "k")
        with pytest.raises(FailedPrecondition):
            snapshotter.mounts("n")
        with pytest.raises(FailedPrecondition, match="not active"):
            snapshotter.commit("m", "n")

    def test_remove_refuses_parents_and_frees_the_name(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k")
        snapshotter.commit("n", "k")
        snapshotter.prepare("child", "n")
        snapshotter.view("look", "n")
        for child in ("child", "look"):
            with pytest.raises(FailedPrecondition, match="cannot remove snapshot with child: failed precondition"):
                snapshotter.remove("n")
            snapshotter.remove(child)
        snapshotter.remove("n")
        assert list(snapshotter.walk()) == []
        snapshotter.prepare("n")

    def test_update_takes_the_named_labels_or_all(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k", labels={"a": "1", "b": "2"})
        before = snapshotter.stat("k")
        info = snapshotter.update(Info(Kind.UNKNOWN, "k", labels={"a": "9", "c": "3"}), ["labels.a", "labels.b"])
        assert dict(info.labels) == {"a": "9"}
        assert info.updated > before.updated
        assert info.created == before.created
        assert info == snapshotter.stat("k")
        info = snapshotter.update(Info(Kind.UNKNOWN, "k", labels={"x.y/z": "3"}), ["labels"])
        assert dict(info.labels) == {"x.y/z": "3"}
        info = snapshotter.update(Info(Kind.UNKNOWN, "k", labels={"x.y/z": "4"}), ["labels.x.y/z"])
        assert dict(info.labels) == {"x.y/z": "4"}
        assert dict(snapshotter.update(Info(Kind.UNKNOWN, "k")).labels) == {}
        with pytest.raises(InvalidArgument, match='cannot update "parent" field'):
            snapshotter.update(Info(Kind.UNKNOWN, "k", parent="p"), ["parent"])

    def test_walk_filters(self, snapshotter: Snapshotter) -> None:
        snapshotter.prepare("k")
        snapshotter.commit("base", "k", {"tier": "os"})
        snapshotter.prepare("one", "base", {"containerd.io/gc.root": "now"})
        snapshotter.view("two", "base")

        def names(*filters: str) -> list[str]:
            return sorted(info.name for info in snapshotter.walk(filters))

        assert names() == ["base", "one", "two"]
        assert names("kind==committed") == ["base"]
        assert names("kind==active", "kind==view") == ["one", "two"]
        assert names("parent==base,name~=^t") == ["two"]
        assert names('labels."containerd.io/gc.root"') == ["one"]
        assert names("labels.tier==os") == ["base"]
        with pytest.raises(InvalidArgument):
            names("name===")

    # sizes

    def test_usage_counts_own_inodes_and_blocks(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        def fill(tree: Path) -> None:
            (tree / "big").write_bytes(b"x" * (1 << 20))
            os.link(tree / "big", tree / "same")
            (tree / "d").mkdir()

        snapshotter.prepare("empty")
        assert snapshotter.usage("empty").inodes == 1
        with mounted(snapshotter.prepare("k"), tmp_path / "m") as tree:
            fill(tree)
            os.sync()
            usage = snapshotter.usage("k")
            assert usage.inodes == 3
            assert 1 << 20 <= usage.size < (1 << 20) + 65536
        snapshotter.commit("n", "k")
        assert snapshotter.usage("n") == usage
        snapshotter.view("v", "n")
        assert snapshotter.usage("v") == Usage()

    # other owners

    def test_a_remapped_snapshot_shows_other_owners_and_touches_no_file(
        self, snapshotter: Snapshotter, tmp_path: Path
    ) -> None:
        if not getattr(snapshotter, "remaps", True):
            pytest.skip("leaves it to its clients")

        def fill(tree: Path) -> None:
            for name, owner in (("root", 0), ("user", 1000), ("outside", 70000)):
                (tree / name).write_text(name)
                os.chown(tree / name, owner, owner)
            (tree / "d").mkdir()

        def owners(tree: Path) -> dict[str, tuple[int, int]]:
            found = {name: (tree / name).lstat() for name in (".", *os.listdir(tree))}
            return {name: (status.st_uid, status.st_gid) for name, status in found.items()}

        layer(snapshotter, tmp_path / "m", "one", "", fill)
        layer(snapshotter, tmp_path / "m", "two", "one", write("more", "m"))
        labels = {
            "containerd.io/snapshot/uidmapping": "0:100000:65536",
            "containerd.io/snapshot/gidmapping": "0:200000:1000,1000:300000:64536",
        }
        zero, user, nobody = (100000, 200000), (101000, 300000), (65534, 65534)
        expected = {".": zero, "root": zero, "user": user, "outside": nobody, "d": zero}
        for kind, make in (("x", snapshotter.prepare), ("v", snapshotter.view)):
            for parent, more in (("one", {}), ("two", {"more": zero})):
                with mounted(make(f"{kind}{parent}", parent, labels), tmp_path / "m") as tree:
                    assert owners(tree) == {**expected, **more}, (kind, parent)
        with mounted(snapshotter.mounts("xtwo"), tmp_path / "m") as tree:
            # what a container's root does, whom the host sees as 100000
            subprocess.run(
                ["setpriv", "--reuid=100000", "--regid=200000", "--clear-groups", "mkdir", "made"], cwd=tree, check=True
            )
            assert owners(tree)["made"] == zero
        with mounted(snapshotter.view("plain", "two"), tmp_path / "m") as tree:
            assert owners(tree)["user"] == (1000, 1000)
            assert "made" not in os.listdir(tree)

    def test_a_mapping_that_is_none_is_refused(self, snapshotter: Snapshotter) -> None:
        if not getattr(snapshotter, "remaps", True):
            pytest.skip("leaves it to its clients")
        uids, gids = "containerd.io/snapshot/uidmapping", "containerd.io/snapshot/gidmapping"
        for value in ("", "0", "0:1", "a:b:c", "0:1:-5", "0:1:99999999999", "0:0:1,"):
            with pytest.raises(InvalidArgument, match="mapping"):
                snapshotter.prepare("k", labels={uids: value, gids: "0:0:1"})
        with pytest.raises(InvalidArgument, match="not the other"):
            snapshotter.prepare("k", labels={uids: "0:0:1"})
        snapshotter.prepare("k", labels={uids: "0:0:1", gids: "0:0:1"})

    # leftovers

    def test_cleanup_deletes_what_has_no_record(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        root = Path(snapshotter.root)  # type: ignore[attr-defined]
        layer(snapshotter, tmp_path / "m", "one", "", write("a", "1"))
        kept = sorted(os.listdir(root / "snapshots"))
        (root / "snapshots" / "4711" / "fs").mkdir(parents=True)
        (root / "snapshots" / "4711" / "fs" / "x").write_text("x")
        (root / "snapshots" / "new-123").mkdir()
        snapshotter.prepare("k", "one")
        snapshotter.remove("k")
        snapshotter.cleanup()
        assert sorted(os.listdir(root / "snapshots")) == kept
        with mounted(snapshotter.view("v", "one"), tmp_path / "v") as tree:
            assert (tree / "a").read_text() == "1"

    def test_a_directory_left_by_a_crash_is_in_nobodys_way(self, snapshotter: Snapshotter, tmp_path: Path) -> None:
        root = Path(snapshotter.root)  # type: ignore[attr-defined]
        snapshotter.prepare("k")
        number = max(int(name) for name in os.listdir(root / "snapshots"))
        left = root / "snapshots" / str(number + 1) / "fs" / "old"
        left.mkdir(parents=True)
        with mounted(snapshotter.prepare("next"), tmp_path / "m") as tree:
            assert os.listdir(tree) == []
