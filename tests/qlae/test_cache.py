"""The converted images: made once, whole or not at all, and not trusted when they or their origin have changed."""

import errno
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qlae.data.cache import ImageCache
from qlae.errors import UserError

SHAPE = (10, 3, 4, 4)
ORIGIN = {"file": "sha256:0"}


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8)


def blocks(seed: int = 0) -> list[np.ndarray]:
    return np.array_split(pixels(seed), 3)


def not_needed() -> Iterator[np.ndarray]:
    raise AssertionError("converted again")


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "cache" / "set.npy", SHAPE)


@pytest.fixture
def written(cache: ImageCache) -> ImageCache:
    cache.open_or_write(ORIGIN, blocks)
    return cache


def test_what_is_written_is_a_plain_numpy_file(cache: ImageCache) -> None:
    opened = cache.open_or_write(ORIGIN, blocks)
    assert np.array_equal(opened, pixels())
    assert np.array_equal(np.load(cache.path), pixels())
    assert sorted(path.name for path in cache.path.parent.iterdir()) == ["set.json", "set.lock", "set.npy"]


def test_it_is_written_once(written: ImageCache) -> None:
    assert np.array_equal(written.open_or_write(ORIGIN, not_needed), pixels())
    assert np.array_equal(written.open(None), pixels())


def test_the_file_cannot_be_changed_through_the_map(written: ImageCache) -> None:
    written.open(ORIGIN)[0] = 0
    assert np.array_equal(np.load(written.path), pixels())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda cache: cache.record_path.unlink(), "without a record that can be read"),
        (lambda cache: cache.record_path.write_text("{"), "without a record that can be read"),
        (lambda cache: os.truncate(cache.path, 100), "cut short"),
        (lambda cache: flip_a_bit(cache.path), "damaged"),
        (lambda cache: cache.record_path.write_text(json.dumps({"format": 0})), "of another version or shape"),
    ],
)
def test_a_damaged_cache_is_noticed_and_made_again(
    written: ImageCache, capsys: pytest.CaptureFixture[str], damage: object, fault: str
) -> None:
    damage(written)
    assert written.open(ORIGIN) is None
    assert np.array_equal(written.open_or_write(ORIGIN, blocks), pixels())
    assert f"set.npy is {fault} and is made again" in capsys.readouterr().err


def test_a_lost_record_is_written_anew_where_there_is_no_source(
    written: ImageCache, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads(written.record_path.read_text())
    written.record_path.write_text("{")
    assert np.array_equal(written.open(None), pixels())
    assert "set.json cannot be read and is written anew from set.npy" in capsys.readouterr().err
    assert json.loads(written.record_path.read_text()) == expected | {"origin": {}}
    assert np.array_equal(written.open(None), pixels()) and capsys.readouterr().err == ""
    assert written.fault(ORIGIN) == "made from other files"


@pytest.mark.parametrize("length", [0, 100, -1, 700])
def test_a_lost_record_of_a_file_that_is_not_whole(written: ImageCache, length: int) -> None:
    written.record_path.unlink()
    os.truncate(written.path, length if length >= 0 else written.path.stat().st_size - 1)
    assert written.open(None) is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))


def test_a_cache_of_other_files_is_stale(written: ImageCache, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"file": "sha256:1"}
    assert written.open(other) is None
    assert np.array_equal(written.open_or_write(other, lambda: blocks(1)), pixels(1))
    assert "made from other files" in capsys.readouterr().err


def test_a_cache_of_another_shape_is_not_used(written: ImageCache) -> None:
    assert ImageCache(written.path, (10, 1, 4, 4)).open(ORIGIN) is None


def test_a_copied_cache_is_checked_and_used(written: ImageCache) -> None:
    os.utime(written.path, ns=(5, 5))
    assert np.array_equal(written.open_or_write(ORIGIN, not_needed), pixels())
    assert json.loads(written.record_path.read_text())["modified_ns"] == 5


def fail_after_one(error: BaseException) -> Iterator[np.ndarray]:
    yield blocks()[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("damaged"), MemoryError()])
def test_an_interrupted_conversion_leaves_nothing(cache: ImageCache, error: BaseException) -> None:
    with pytest.raises(type(error)):
        cache.open_or_write(ORIGIN, lambda: fail_after_one(error))
    assert [path.name for path in cache.path.parent.iterdir()] == ["set.lock"]
    assert np.array_equal(cache.open_or_write(ORIGIN, blocks), pixels())


def test_an_interrupted_conversion_keeps_what_was_there(written: ImageCache) -> None:
    with pytest.raises(KeyboardInterrupt):
        written.open_or_write({"file": "other"}, lambda: fail_after_one(KeyboardInterrupt()))
    assert np.array_equal(written.open(ORIGIN), pixels())


def convert_and_die(path: Path) -> None:
    def deadly() -> Iterator[np.ndarray]:
        yield blocks()[0]
        os.kill(os.getpid(), signal.SIGKILL)

    ImageCache(path, SHAPE).open_or_write(ORIGIN, deadly)


def test_a_killed_conversion_is_not_taken_for_a_whole_one(cache: ImageCache) -> None:
    process = multiprocessing.get_context("fork").Process(target=convert_and_die, args=(cache.path,))
    process.start()
    process.join(60.0)
    assert process.exitcode == -signal.SIGKILL
    assert cache.open(ORIGIN) is None
    assert np.array_equal(cache.open_or_write(ORIGIN, blocks), pixels())
    assert not list(cache.path.parent.glob("*.partial"))


def test_what_a_killed_conversion_left_takes_no_room(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = cache.path.with_suffix(".partial")
    partial.parent.mkdir()
    partial.write_bytes(bytes(400))
    # a disk of 600 bytes; the images take 480
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: SimpleNamespace(free=600 - (400 if partial.exists() else 0))
    )
    assert np.array_equal(cache.open_or_write(ORIGIN, blocks), pixels())


def test_too_few_images_are_not_taken_for_all(cache: ImageCache) -> None:
    with pytest.raises(ValueError, match="4 images were made"):
        cache.open_or_write(ORIGIN, lambda: blocks()[:1])
    assert not cache.path.exists()


def test_a_disk_that_fills_up_is_named(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*set\.npy \(No space left on device\): make room"):
        cache.open_or_write(ORIGIN, blocks)
    assert [path.name for path in cache.path.parent.iterdir()] == ["set.lock"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot write into"):
        ImageCache(tmp_path / "cache" / "set.npy", SHAPE).open_or_write(ORIGIN, blocks)


def convert(path: Path, started: object, counter: object) -> None:
    def slow() -> Iterator[np.ndarray]:
        with counter.get_lock():
            counter.value += 1
        started.set()
        for _ in range(10_000_000):
            pass
        yield pixels()

    ImageCache(path, SHAPE).open_or_write(ORIGIN, slow)


def test_two_processes_convert_once(cache: ImageCache) -> None:
    context = multiprocessing.get_context("fork")
    started, counter = context.Event(), context.Value("i", 0)
    processes = [context.Process(target=convert, args=(cache.path, started, counter)) for _ in range(2)]
    processes[0].start()
    assert started.wait(30.0)
    processes[1].start()
    for process in processes:
        process.join(60.0)
    assert [process.exitcode for process in processes] == [0, 0]
    assert counter.value == 1
    assert np.array_equal(cache.open(ORIGIN), pixels())
