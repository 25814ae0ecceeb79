"""Downloads against a server on 127.0.0.1: whole, resumed, refused, wrong."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlae.data import download as module
from qlae.data.download import download
from qlae.data.files import SourceFile, check_digest
from qlae.errors import UserError

CONTENT = bytes(range(256)) * 400
DIGEST = f"md5:{hashlib.md5(CONTENT).hexdigest()}"


class Server:
    """Serves one file; tests set how it misbehaves.

    Attributes:
        ranges: whether it understands Range.
        says_length, says_range: whether its answers have these headers.
        shift: by how much a part begins elsewhere than it was asked to.
        breaks_after: bytes after which each of the next connections ends; None for whole ones.
        requests: the Range header of each request, None where there was none.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.ranges = True
        self.status = 200
        self.says_length = True
        self.says_range = True
        self.shift = 0
        self.breaks_after: list[int | None] = []
        self.requests: list[str | None] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append(wanted)
        if self.status != 200:
            handler.send_error(self.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start and start >= len(self.content):
            handler.send_response(416)
            if self.says_length:
                handler.send_header("Content-Range", f"bytes */{len(self.content)}")
            handler.end_headers()
            return
        body = self.content[start:]
        partly = bool(wanted) and self.ranges
        handler.send_response(206 if partly else 200)
        if partly and self.says_range:
            handler.send_header("Content-Range", f"bytes {start + self.shift}-{len(self.content) - 1}/*")
        if self.says_length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        kept = self.breaks_after.pop(0) if self.breaks_after else None
        handler.wfile.write(body[:kept])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{http.server_address[1]}/file.bin"
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def file(server: Server) -> SourceFile:
    return SourceFile("set/file.bin", server.address, DIGEST)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_a_file_is_fetched_verified_and_put_in_its_place(tmp_path: Path, file: SourceFile) -> None:
    assert download(file, tmp_path) == tmp_path / "set" / "file.bin"
    assert (tmp_path / "set" / "file.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin", "file.bin.checked"]


def test_a_verified_file_is_not_read_again(tmp_path: Path, file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download(file, tmp_path)
    monkeypatch.setattr("qlae.data.files.file_digest", lambda *_: pytest.fail("read again"))
    check_digest(path, DIGEST)


def test_a_broken_connection_is_made_anew(
    tmp_path: Path, server: Server, file: SourceFile, capsys: pytest.CaptureFixture[str]
) -> None:
    server.breaks_after = [1000, 2000]
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=1000-", "bytes=3000-"]
    assert "the connection ended after 1,000 of 102,400 bytes" in capsys.readouterr().err


def test_an_interrupted_download_goes_on_later(
    tmp_path: Path, server: Server, file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.read
    monkeypatch.setattr(module, "BLOCK_BYTES", 5000)
    blocks = 0

    def interrupted(response: object) -> bytes:
        nonlocal blocks
        blocks += 1
        if blocks == 4:
            raise KeyboardInterrupt
        return original(response)

    monkeypatch.setattr(module, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download(file, tmp_path)
    assert names(tmp_path) == ["file.bin.download"]
    monkeypatch.setattr(module, "read", original)
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=15000-"]


def test_a_server_without_ranges_starts_again(tmp_path: Path, server: Server, file: SourceFile) -> None:
    server.ranges = False
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.download").write_bytes(CONTENT[:3000])
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == ["bytes=3000-"]


def test_a_server_without_ranges_that_breaks_off(tmp_path: Path, server: Server, file: SourceFile) -> None:
    server.ranges = False
    server.breaks_after = [4000, 4000]
    with pytest.raises(UserError, match="4,000 bytes are kept"):
        download(file, tmp_path)
    assert download(file, tmp_path).read_bytes() == CONTENT


def test_a_server_that_does_not_say_the_length(tmp_path: Path, server: Server, file: SourceFile) -> None:
    server.says_length = False
    assert download(file, tmp_path).read_bytes() == CONTENT


def kept(root: Path, content: bytes) -> None:
    (root / "set").mkdir()
    (root / "set" / "file.bin.download").write_bytes(content)


@pytest.mark.parametrize("digest", [DIGEST, None])
def test_a_whole_part_is_verified_and_not_fetched_again(
    tmp_path: Path, server: Server, file: SourceFile, digest: str | None
) -> None:
    kept(tmp_path, CONTENT)
    assert download(replace(file, digest=digest), tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-"]


def test_a_whole_part_of_other_content_is_deleted(tmp_path: Path, server: Server, file: SourceFile) -> None:
    kept(tmp_path, CONTENT[::-1])
    with pytest.raises(UserError, match="was not the published file, and is deleted"):
        download(file, tmp_path)
    assert names(tmp_path) == []


def test_a_part_longer_than_the_file_is_fetched_anew(tmp_path: Path, server: Server, file: SourceFile) -> None:
    kept(tmp_path, CONTENT + b"more")
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_whole_part_is_fetched_anew_where_the_server_does_not_say_the_length(
    tmp_path: Path, server: Server, file: SourceFile
) -> None:
    server.says_length = False
    kept(tmp_path, CONTENT)
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [f"bytes={len(CONTENT)}-", None]


@pytest.mark.parametrize(("shift", "says_range"), [(-1000, True), (1, True), (0, False)])
def test_a_part_that_begins_elsewhere_is_not_appended(
    tmp_path: Path, server: Server, file: SourceFile, shift: int, says_range: bool
) -> None:
    server.shift, server.says_range = shift, says_range
    kept(tmp_path, CONTENT[:3000])
    with pytest.raises(UserError, match=r"asked for the bytes from 3,000 on, the server sends .*3,000 bytes are kept"):
        download(replace(file, digest=None), tmp_path)
    assert (tmp_path / "set" / "file.bin.download").read_bytes() == CONTENT[:3000]


@pytest.mark.parametrize("ranges", [True, False])
def test_what_is_there_already_needs_no_room(
    tmp_path: Path, server: Server, file: SourceFile, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    server.ranges = ranges
    kept(tmp_path, CONTENT[:3000])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=len(CONTENT) - 3000))
    assert download(file, tmp_path).read_bytes() == CONTENT


def test_a_wrong_file_is_deleted(tmp_path: Path, server: Server, file: SourceFile) -> None:
    server.content = CONTENT[::-1]
    with pytest.raises(UserError, match=r"was not the published file, and is deleted: .* its md5 is"):
        download(file, tmp_path)
    assert names(tmp_path) == []


def test_a_part_of_another_file_is_noticed(tmp_path: Path, file: SourceFile) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "file.bin.download").write_bytes(b"x" * 3000)
    with pytest.raises(UserError, match="was not the published file"):
        download(file, tmp_path)
    assert names(tmp_path) == []
    assert download(file, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_server_that_refuses(tmp_path: Path, server: Server, file: SourceFile, status: int) -> None:
    server.status = status
    with pytest.raises(UserError, match=f"cannot download {server.address} .the server answers {status}"):
        download(file, tmp_path)
    assert names(tmp_path) == []


def test_no_server(tmp_path: Path) -> None:
    # nothing listens on the port of discard
    file = SourceFile("file.bin", "http://127.0.0.1:9/file.bin")
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1:9/file\.bin .*refused"):
        download(file, tmp_path)


def test_too_little_room_is_told_before(tmp_path: Path, file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=f"no room in {tmp_path / 'set'}"):
        download(file, tmp_path)


def full_after(count: int) -> Callable[..., None]:
    def copy(response: object, output: object, start: int, total: int) -> None:
        output.write(response.read(count))
        output.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return copy


def test_a_disk_that_fills_up_keeps_what_there_is(
    tmp_path: Path, server: Server, file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "copy", full_after(7000))
        with pytest.raises(UserError, match=r"No space left on device.*make room, then run this again"):
            download(file, tmp_path)
    assert names(tmp_path) == ["file.bin.download"]
    assert download(file, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=7000-"]
