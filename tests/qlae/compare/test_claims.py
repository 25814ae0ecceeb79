import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qlae.compare.claims import Owner, claim, is_held_by, owner_of, release_of
from qlae.errors import StorageError, UserError

# takes the claim if it can, says so, and keeps it until its input ends
HOLDER = """
import sys
from pathlib import Path
from qlae.compare.claims import claim
with claim(Path(sys.argv[1])) as taken:
    print(taken, flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ended_owner() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.of(process.pid)
    process.communicate()
    return owner


def test_a_claim_is_held_once_and_freed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "seed0.claim"
    with claim(path) as taken:
        assert taken
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert owner_of(path) == Owner.current()
        with claim(path) as again:
            assert not again
        assert path.exists()
    assert list(path.parent.iterdir()) == []


def test_the_claim_of_a_living_process_is_kept_and_that_of_a_dead_one_taken(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    holder = start_holder(path)
    assert holder.stdout.readline() == "True\n"
    with claim(path) as taken:
        assert not taken
    assert owner_of(path) == Owner.of(holder.pid)
    assert str(owner_of(path)) == f"process {holder.pid} on {socket.gethostname()}"
    holder.kill()
    holder.communicate()
    assert path.exists() and owner_of(path) is None
    with claim(path) as taken:
        assert taken
        assert owner_of(path) == Owner.current()
    assert not path.exists()


def test_many_take_over_a_stale_claim_and_one_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    stale = ended_owner()
    for _ in range(20):
        path.write_text(json.dumps(asdict(stale)))
        barrier, results = threading.Barrier(8), []

        def contend(barrier: threading.Barrier = barrier, results: list[bool] = results) -> None:
            barrier.wait()
            with claim(path) as taken:
                results.append(taken)
                # nobody frees it before all have tried
                barrier.wait()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [False] * 7 + [True]


def test_a_new_process_with_an_old_number_is_not_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    path.write_text(json.dumps(asdict(replace(Owner.current(), start="another boot:1"))))
    assert owner_of(path) is None
    with claim(path) as taken:
        assert taken


def test_another_hosts_claim_is_never_taken(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    elsewhere = replace(ended_owner(), host="elsewhere/pid:[1]")
    path.write_text(json.dumps(asdict(elsewhere)))
    with claim(path) as taken:
        assert not taken
    assert owner_of(path) == elsewhere


def test_only_the_named_owners_claim_is_released(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    dead = ended_owner()
    assert not is_held_by(path, dead)
    path.write_text(json.dumps(asdict(Owner.current())))
    release_of(path, dead)
    assert owner_of(path) == Owner.current()
    path.write_text(json.dumps(asdict(dead)))
    assert is_held_by(path, dead)
    release_of(path, dead)
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_file_that_is_no_claim_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "claim"
    path.write_text(content)
    with pytest.raises(UserError, match=r"is not a claim .* delete it"), claim(path):
        pass
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot claim"), claim(tmp_path / "file" / "claim"):
        pass
