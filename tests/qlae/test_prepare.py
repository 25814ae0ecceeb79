"""`prepare` and the list of sets, with a small set served from 127.0.0.1."""

import errno
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from qlae.cli import main
from qlae.data import DATASETS, Factor
from qlae.data.dsprites import DSprites
from qlae.data.prepare import list_datasets, prepare
from qlae.errors import UserError

LENGTH = 4


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[DSprites]]:
    """The set `small`, of four images in the format of dSprites."""
    published = tmp_path / "published"
    published.mkdir()
    classes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], np.int64)
    images = np.arange(LENGTH)[:, None, None] % 2 * np.ones((64, 64))
    np.savez(published / "small.npz", imgs=images.astype(np.uint8), latents_classes=classes)
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=published))
    thread = Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    file = replace(DSprites.files[0], path="small.npz", address=f"http://127.0.0.1:{http.server_address[1]}/small.npz")
    kind = type("Small", (DSprites,), {"factors": (Factor("a", 2), Factor("b", 2)), "files": (file,), "name": "small"})
    monkeypatch.setitem(DATASETS, "small", kind)
    yield kind
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_set_is_downloaded_and_converted(small: type[DSprites], tmp_path: Path) -> None:
    root = tmp_path / "root"
    dataset = prepare("small", root)
    assert dataset.images(torch.arange(LENGTH))[:, 0, 0, 0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert (root / "small.npz").is_file() and small.state(root) == "converted"


def test_a_prepared_set_needs_no_server(small: type[DSprites], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("small", tmp_path)
    (tmp_path / "small.npz").unlink()
    monkeypatch.setattr("qlae.data.prepare.download", lambda *_: pytest.fail("downloaded again"))
    assert len(prepare("small", tmp_path)) == LENGTH


def test_a_file_that_a_person_has_to_fetch_is_named(
    small: type[DSprites], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = replace(small.files[0], address="https://example.org/small", by_hand="download the file")
    monkeypatch.setattr(small, "files", (file,))
    with pytest.raises(UserError) as caught:
        prepare("small", tmp_path)
    assert "open https://example.org/small in a browser" in str(caught.value)
    assert str(tmp_path / "small.npz") in str(caught.value)


def test_a_bad_file_says_how_to_get_a_good_one(small: type[DSprites], tmp_path: Path) -> None:
    (tmp_path / "small.npz").write_bytes(b"an error page")
    with pytest.raises(UserError, match=r"small\.npz cannot be read .*: delete it and run `qlae data prepare NAME`"):
        prepare("small", tmp_path)
    (tmp_path / "small.npz").unlink()
    assert len(prepare("small", tmp_path)) == LENGTH


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data set 'shapes4d'.*shapes3d"):
        prepare("shapes4d", tmp_path)


def test_the_list_says_what_is_there(small: type[DSprites], tmp_path: Path) -> None:
    assert line_of("small", list_datasets(tmp_path))[1:4] == ["4", "16/32/64", "missing"]
    prepare("small", tmp_path)
    text = list_datasets(tmp_path)
    assert line_of("small", text)[1:4] == ["4", "16/32/64", "converted"]
    assert line_of("isaac3d", text)[1:3] == ["737,280", "16/32/64"]
    assert "object_shape[3], robot_x[8], robot_y[5]" in text
    assert max(map(len, text.splitlines())) <= 100


def line_of(name: str, text: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def test_the_commands(
    small: type[DSprites], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "small", "--root", "root"]) == 0
    assert capsys.readouterr().out == "small: dSprites, 4 images of 64 x 64 pixels\n"
    assert main(["data", "list", "--root", "root"]) == 0
    assert "converted" in capsys.readouterr().out
    assert main(["data", "show", "small", "--root", "root"]) == 0
    assert capsys.readouterr().out == "small-factors.png\n"
    assert Path("small-factors.png").is_file()


def test_a_picture_that_cannot_be_finished_leaves_the_older_one(
    small: type[DSprites], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(dataset: object, path: Path, *, image: int | None) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    prepare("small", tmp_path)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"older")
    monkeypatch.setattr("qlae.figures.plot_factors", full)
    assert main(["data", "show", "small", "--root", str(tmp_path), "--output", str(picture)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert picture.read_bytes() == b"older" and not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "needs the name of a data set"),
        (["show"], "needs the name of a data set"),
        (["prepare", "nothing"], "no data set 'nothing'"),
        (["show", "nothing"], "no data set or folder 'nothing'"),
        (["prepare", "falcor3d"], "1XAQfFK1x6cpN1eiovbP0hVfLTm5SsSoJ"),
        (["show", "isaac3d"], "is missing"),
        (["show", "rooms3d", "--resolution", "16", "--image", "480000"], "images 0 to 479999"),
        (["show", "rooms3d", "--resolution", "20"], "choose one of 16, 32 and 64"),
        (["show", "rooms3d", "--resolution", "16", "--output", "file/picture.png"], "cannot write file/picture.png"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qlae: error: ") and error.count("\n") == 1 and message in error
