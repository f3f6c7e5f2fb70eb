"""Leases: who holds one, when it is free, and how its holder notices that it lost it."""

import json
import os
import subprocess
import threading
import time

import pytest
from etils import epath

from deltapref_jax.artifacts import lease as leases
from deltapref_jax.artifacts.lease import LEASE_SECONDS, Lease, _pid_namespace

HOUR = 3600
OLD = LEASE_SECONDS + 1  # seconds


def claim(path, age=0.0, **fields):
    """The claim of a process on another host, whose file was written `age` seconds ago."""
    path.write_text(
        json.dumps({"host": "elsewhere", "pid": 1, "id": "x", "expires": time.time() + 60} | fields)
    )
    os.utime(path, (time.time() - age,) * 2)
    return epath.Path(path)


def dead_pid():
    gone = subprocess.Popen(["true"])
    gone.wait()
    return gone.pid


def test_live_lease_of_another_host_is_respected_and_stale_ones_are_taken_over(tmp_path):
    path = tmp_path / "claim"
    assert not Lease(claim(path)).take()
    assert not Lease(claim(path, host=_pid_namespace(), pid=os.getpid())).take()
    for stale in ({"age": OLD}, {"host": _pid_namespace(), "pid": dead_pid()}):
        lease = Lease(claim(path, **stale))
        assert lease.take()
        lease.release()
        assert not path.exists()
    path.write_text('{"host": ')
    assert Lease(epath.Path(path)).take()


def test_lease_is_renewed_while_held_and_ends_with_release(tmp_path):
    path = epath.Path(tmp_path / "claim")
    held = Lease(path, seconds=0.4)
    assert held.take()
    time.sleep(0.8)
    assert not Lease(path).take()
    held.release()
    assert Lease(path).take()


def test_lost_lease_is_noticed_and_not_given_back(tmp_path):
    path = tmp_path / "claim"
    mine = Lease(epath.Path(path), seconds=0.2)
    assert mine.take()
    claim(path, id="theirs")
    time.sleep(0.3)
    assert mine.lost
    mine.release()
    assert json.loads(path.read_text())["id"] == "theirs"


def test_one_of_many_takes_a_stale_lease_over(tmp_path):
    path = claim(tmp_path / "claim", age=OLD)
    barrier, won = threading.Barrier(12), []

    def race():
        lease = Lease(path)
        barrier.wait()
        won.append(lease.take())

    threads = [threading.Thread(target=race) for _ in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(won) == [False] * 11 + [True]


@pytest.mark.parametrize("clock", [-HOUR, HOUR, 1e12])
def test_the_clock_of_the_holders_host_does_not_count(tmp_path, clock):
    """A live claim is respected whatever expiry it names, and a silent one is not."""
    expires = time.time() + 60 + clock
    assert not Lease(claim(tmp_path / "live", expires=expires)).take()
    assert Lease(claim(tmp_path / "dead", age=OLD, expires=expires)).take()


def test_a_claim_from_the_future_is_free_when_it_was_seen_unchanged_for_a_leases_time(tmp_path):
    path = claim(tmp_path / "claim", age=-HOUR)
    assert not Lease(path, seconds=0.3).take()
    time.sleep(0.2)
    assert not Lease(path, seconds=0.3).take()
    claim(tmp_path / "claim", age=-HOUR, expires=1)  # It was rewritten in the meantime.
    time.sleep(0.2)
    assert not Lease(path, seconds=0.3).take()
    time.sleep(0.4)
    assert Lease(path, seconds=0.3).take()


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": "1"},
        {"pid": True},
        {"pid": 0},
        {"pid": -1},
        {"pid": 10**30},
        {"pid": None},
        {"pid": 1.5},
        {"pid": [1]},
    ],
)
def test_a_claim_that_no_process_could_have_written_is_free(tmp_path, fields):
    here = {"host": _pid_namespace()}
    assert Lease(claim(tmp_path / "claim", **here | fields)).take()


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", '"x"', "{}", '{"host": ', "\0", "{" * 9999]
)
def test_a_claim_that_is_no_claim_is_free(tmp_path, text):
    path = tmp_path / "claim"
    path.write_text(text)
    assert Lease(epath.Path(path)).take()


@pytest.mark.parametrize("expires", ["soon", None, [], {}, "1e99"])
def test_an_expiry_that_is_no_number_does_not_matter(tmp_path, expires):
    assert not Lease(claim(tmp_path / "live", expires=expires)).take()
    assert Lease(claim(tmp_path / "dead", age=OLD, expires=expires)).take()


def test_a_lease_that_another_took_is_noticed_when_it_is_asked(tmp_path):
    """Before the thread that renews would notice."""
    path = tmp_path / "claim"
    for change in (lambda: claim(path), path.unlink, lambda: path.write_text("{")):
        mine = Lease(epath.Path(path))
        assert mine.take()
        assert mine.held()
        change()
        assert not mine.held()
        mine.release()
        path.unlink(missing_ok=True)


def test_a_lease_that_slept_and_was_not_taken_is_renewed_when_it_is_asked(tmp_path, monkeypatch):
    path = tmp_path / "claim"
    mine = Lease(epath.Path(path))
    assert mine.take()
    os.utime(path, (time.time() - HOUR,) * 2)
    slept = leases._clock() + HOUR
    monkeypatch.setattr(leases, "_clock", lambda: slept)
    assert mine.held()
    assert path.stat().st_mtime > time.time() - 60
    assert not Lease(epath.Path(path)).take()


def test_a_claim_that_cannot_be_read_at_the_moment_is_not_lost(tmp_path, monkeypatch):
    mine = Lease(epath.Path(tmp_path / "claim"))
    assert mine.take()

    def stale():
        raise OSError("Stale file handle")

    monkeypatch.setattr(mine, "_text", stale)
    assert mine.held()


def test_a_lease_whose_folder_was_removed_is_lost(tmp_path, monkeypatch):
    """Whoever completes an artifact removes its claims; a process that slept meanwhile notices."""
    mine = Lease(epath.Path(tmp_path / "claims" / "train"))
    assert mine.take() and mine.held()
    leases.remove_claims(epath.Path(tmp_path / "claims"))
    monkeypatch.setattr(mine, "_renewed", mine._renewed - OLD)  # it is late, and renews first
    assert not mine.held()
    assert not (tmp_path / "claims").exists()


def test_claims_beside_which_a_lock_is_made_anew_are_left(tmp_path, monkeypatch):
    """Another runner makes the lock again between the last removal and that of the folder."""
    claims = epath.Path(tmp_path / "claims")
    claims.mkdir()
    unlink = type(claims).unlink

    def removed(path):
        unlink(path)
        (claims / "anew").touch()

    monkeypatch.setattr(type(claims), "unlink", removed)
    leases.remove_claims(claims)
    assert [path.name for path in claims.iterdir()] == ["anew"]
