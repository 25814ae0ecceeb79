"""Folders of a person's own images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlae.data.image_folder import ImageFolder
from qlae.errors import UserError


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_images_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    arrays = {name: noise(6, 8, 3, seed=seed) for seed, name in enumerate(["b/c.png", "a.bmp", "b/a.PNG"])}
    for name, array in arrays.items():
        save(tmp_path / name, array)
    dataset = ImageFolder.load(tmp_path)
    assert (len(dataset), dataset.image_shape, dataset.factors) == (3, (3, 6, 8), ())
    images = dataset.images(torch.tensor([2, 0, 1]))
    expected = np.stack([arrays[name] for name in ("b/c.png", "a.bmp", "b/a.PNG")]).transpose(0, 3, 1, 2)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(expected.astype(np.float32) / np.float32(255)))


def test_there_are_no_sources(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(4, 4, 3))
    sources = ImageFolder.load(tmp_path).sources(torch.tensor([0, 0]))
    assert (sources.shape, sources.dtype) == ((2, 0), torch.int64)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = noise(5, 5)
    save(tmp_path / "a.png", grey)
    image = ImageFolder.load(tmp_path).images(torch.tensor([0]))[0]
    assert torch.equal(image, (torch.from_numpy(grey).float() / 255).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(tmp_path / f"a.{suffix}")
    assert ImageFolder.load(tmp_path).images(torch.tensor([0])).min() > 0.95


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "webp"])
def test_every_named_format_is_read(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a.{suffix}", np.full((8, 8, 3), 128, np.uint8))
    image = ImageFolder.load(tmp_path).images(torch.tensor([0]))
    # the lossy formats may be off by a level or two on a flat picture
    assert (image - 128 / 255).abs().max() <= 2 / 255


def test_the_camera_s_orientation_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(4, 8, 3)).save(tmp_path / "a.png", exif=exif)
    assert ImageFolder.load(tmp_path).image_shape == (3, 8, 4)


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(4, 4, 3))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.png").write_text("not an image")
    (tmp_path / "._a.png").write_text("not an image")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    assert len(ImageFolder.load(tmp_path)) == 1


def test_other_size_is_named_with_the_expected_one(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(4, 6, 3))
    save(tmp_path / "b.png", noise(4, 4, 3))
    with pytest.raises(UserError, match=r"b\.png is 4 x 4 pixels, but .*a\.png is 6 x 4.*--resolution"):
        ImageFolder.load(tmp_path)


def test_resolution_makes_sizes_equal(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(40, 60, 3))
    save(tmp_path / "b.png", noise(20, 10, 3))
    assert ImageFolder.load(tmp_path, resolution=16).image_shape == (3, 16, 16)


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "a.png", stripes)
    image = ImageFolder.load(tmp_path, resolution=8).images(torch.tensor([0]))
    # stripes finer than a pixel turn grey; picking pixels would give black or white
    assert (image - 0.5).abs().max() < 0.1


def test_resizing_keeps_the_central_square(tmp_path: Path) -> None:
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    save(tmp_path / "a.png", wide)
    assert ImageFolder.load(tmp_path, resolution=16).images(torch.tensor([0])).min() == 1.0


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"])
def test_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "a.png", noise(4, 4, 3))
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.png cannot be read as an image"):
        ImageFolder.load(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", noise(64, 64, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix} cannot be read as an image"):
        ImageFolder.load(tmp_path)


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(4, 4).astype(np.uint16) * 256)
    with pytest.raises(UserError, match="more than 8 bits"):
        ImageFolder.load(tmp_path)


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=f"no images in {tmp_path}"):
        ImageFolder.load(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        ImageFolder.load(tmp_path / "none")


@pytest.mark.parametrize("resolution", [0, -1])
def test_resolution_has_to_be_positive(tmp_path: Path, resolution: int) -> None:
    save(tmp_path / "a.png", noise(4, 4, 3))
    with pytest.raises(UserError, match="resolution"):
        ImageFolder.load(tmp_path, resolution=resolution)
