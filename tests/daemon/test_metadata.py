"""The database: batches, rollbacks, syncs, checkpoints, migrations, and SIGKILL in the middle of it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from tests.daemon.stores import killed
from wherry.core.errors import FailedPrecondition, Internal, NotFound, ResourceExhausted, Unavailable
from wherry.daemon.metadata import WAL_RESERVE, Metadata
from wherry.daemon.metadata_schema import MIGRATIONS


def insert(name: str):  # type: ignore[no-untyped-def]
    return lambda db: db.execute("INSERT INTO namespaces (name) VALUES (?)", (name,))


def names(metadata: Metadata) -> list[str]:
    row = metadata.row("SELECT group_concat(name) FROM (SELECT name FROM namespaces ORDER BY name)")
    return row[0].split(",") if row and row[0] else []


async def test_what_is_written_is_read_at_once(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    await metadata.write(insert("a"))
    assert names(metadata) == ["a"]
    assert await metadata.rows("SELECT name FROM namespaces") == [("a",)]
    await metadata.close()


async def test_many_at_once_share_transactions_and_one_that_fails_takes_nobody_along(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))

    def fails(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO namespaces (name) VALUES ('half')")
        raise NotFound("no")

    works = [insert(f"n{i:03}") for i in range(100)]
    works[50] = fails
    results = await asyncio.gather(*(metadata.write(work) for work in works), return_exceptions=True)
    assert [index for index, result in enumerate(results) if isinstance(result, NotFound)] == [50]
    assert len(names(metadata)) == 99
    assert "half" not in names(metadata)
    assert metadata.generation < 50
    await metadata.close()


async def test_a_single_failure_rolls_back(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))

    def fails(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO namespaces (name) VALUES ('half')")
        db.execute("SELECT * FROM missing")

    with pytest.raises(Internal, match="no such table: missing"):
        await metadata.write(fails)
    assert names(metadata) == []
    await metadata.close()


async def test_a_full_database_says_so_and_goes_on(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    pages = (await metadata.write(lambda db: db.execute("PRAGMA page_count").fetchone()))[0]
    await metadata.write(lambda db: db.execute(f"PRAGMA max_page_count = {pages + 2}").fetchone())
    with pytest.raises(ResourceExhausted, match="no space left on device"):
        await metadata.write(lambda db: db.execute("INSERT INTO namespaces VALUES (?, ?)", ("big", "x" * 100_000)))
    await metadata.write(insert("small"))
    assert names(metadata) == ["small"]
    await metadata.close()


async def test_a_write_after_close_is_refused(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    await metadata.close()
    with pytest.raises(Unavailable):
        await metadata.write(insert("a"))


async def test_watchers_hear_what_removes(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    heard: list[bool] = []
    metadata.watch(heard.append)
    await metadata.write(insert("a"))
    await metadata.write(lambda db: db.execute("DELETE FROM namespaces"), removes=True)
    assert heard == [False, True]
    await metadata.close()


async def test_syncs_are_shared_by_all_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    real, calls = os.fdatasync, []

    def counted(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    await asyncio.gather(*(metadata.write(insert(f"n{i}"), durable=True) for i in range(50)))
    assert 1 <= len(calls) <= 10
    await metadata.close()


async def test_a_checkpoint_empties_the_wal_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    metadata = await Metadata.open(str(path))
    for number in range(20):
        await metadata.write(insert(f"n{number}"))
    assert (tmp_path / "m.db-wal").stat().st_size > 0
    await metadata.checkpoint()
    assert (tmp_path / "m.db-wal").stat().st_size == 0
    await metadata.write(insert("after"), durable=True)
    assert (tmp_path / "m.db-wal").stat().st_size > 0
    await metadata.close()
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM namespaces").fetchone() == (21,)
    database.close()


async def test_the_disk_keeps_room_for_the_wal(tmp_path: Path) -> None:
    metadata = await Metadata.open(str(tmp_path / "m.db"))
    wal = tmp_path / "m.db-wal"
    assert wal.stat().st_blocks * 512 >= WAL_RESERVE
    await metadata.write(insert("a"))
    await metadata.checkpoint()
    assert wal.stat().st_size == 0
    assert wal.stat().st_blocks * 512 >= WAL_RESERVE
    await metadata.close()


async def test_it_opens_again_with_what_was_written(tmp_path: Path) -> None:
    path = str(tmp_path / "m.db")
    metadata = await Metadata.open(path)
    await metadata.write(insert("a"))
    await metadata.close()
    metadata = await Metadata.open(path)
    assert names(metadata) == ["a"]
    await metadata.close()


async def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    database.close()
    with pytest.raises(FailedPrecondition, match="schema version"):
        await Metadata.open(str(path))


async def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    path.write_bytes(b"not a database, not a database, not a database" * 100)
    with pytest.raises(Internal, match="not a database"):
        await Metadata.open(str(path))


KILLED = """
import asyncio, sys
from wherry.daemon.metadata import Metadata

async def main():
    metadata = await Metadata.open(sys.argv[1])
    number = 0
    while True:
        name = f"n{number:06}"
        await metadata.write(
            lambda db: db.execute("INSERT INTO namespaces (name) VALUES (?)", (name,)), durable=number % 10 == 0
        )
        print(number, flush=True)
        number += 1

asyncio.run(main())
"""


async def test_a_kill_between_writes_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    path = str(tmp_path / "m.db")
    for turn in range(3):
        answered = killed(KILLED.replace("n{number", f"r{turn}-{{number"), path, lines=150)
        metadata = await Metadata.open(path)
        found = {name for name in names(metadata) if name.startswith(f"r{turn}-")}
        assert {f"r{turn}-{int(number):06}" for number in answered} <= found
        assert await metadata.rows("PRAGMA integrity_check") == [("ok",)]
        await metadata.close()
