"""rooms3d: its factors, its pixels, and that every factor shows."""

import colorsys

import pytest
import torch

from qlae.data import held_out_split
from qlae.data.base import index_of_factors
from qlae.data.rooms3d import FACTORS, INTERSECT, SATURATION, SHAPES, VALUE, Rooms3D, hue_colours
from qlae.errors import UserError


@pytest.fixture(scope="module")
def rooms() -> Rooms3D:
    return Rooms3D(16)


def test_factors_are_those_of_shapes3d(rooms: Rooms3D) -> None:
    assert [(factor.name, factor.size) for factor in rooms.factors] == [
        ("floor_hue", 10),
        ("wall_hue", 10),
        ("object_hue", 10),
        ("scale", 8),
        ("shape", 4),
        ("orientation", 15),
    ]
    assert len(rooms) == 480_000


@pytest.mark.parametrize("resolution", [16, 32])
def test_images_are_float32_in_the_unit_range(resolution: int) -> None:
    rooms = Rooms3D(resolution)
    images = rooms.images(torch.randint(0, len(rooms), (500,)))
    assert images.shape == (500, 3, resolution, resolution)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images.min() >= 0.0
    assert images.max() <= 1.0


def test_the_resolutions_show_the_same_picture() -> None:
    index = torch.arange(0, 480_000, 4801)
    fine, coarse = Rooms3D(32).images(index), Rooms3D(16).images(index)
    # both average point samples, 64 against 16 a pixel, so they differ by sampling noise along edges only
    difference = (torch.nn.functional.avg_pool2d(fine, 2) - coarse).abs()
    assert difference.mean() < 0.01


def test_index_and_sources_are_row_major(rooms: Rooms3D) -> None:
    assert rooms.sources(torch.tensor([0, 15, 479_999])).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [9, 9, 9, 7, 3, 14],
    ]


def test_an_image_is_the_sum_of_its_materials(rooms: Rooms3D) -> None:
    index = index_of_factors(torch.tensor([[3, 5, 8, 2, 1, 9]]), FACTORS)
    floor, wall, thing, sky = rooms._maps[(2 * 4 + 1) * 15 + 9].double()
    hues = hue_colours(10).double()
    for channel in range(3):
        expected = hues[3, channel] * floor + hues[5, channel] * wall + hues[8, channel] * thing
        expected = expected + rooms._sky[channel] * sky
        # four float32 products and three sums of values below 1
        assert torch.allclose(rooms.images(index)[0, channel].double().flatten(), expected, atol=8e-7, rtol=0)


def test_hues_are_those_of_the_standard_library() -> None:
    expected = [colorsys.hsv_to_rgb(step / 10, SATURATION, VALUE) for step in range(10)]
    # positions up to 6 carry a rounding error of 3 ulp(6), i.e. 1.5e-6
    assert torch.allclose(hue_colours(10), torch.tensor(expected), atol=2e-6, rtol=0)


@pytest.mark.parametrize("position", range(6))
def test_every_step_of_every_factor_shows(rooms: Rooms3D, position: int) -> None:
    generator = torch.Generator().manual_seed(position)
    sources = torch.stack([torch.randint(0, f.size, (64,), generator=generator) for f in FACTORS], dim=1)
    sources[:, position] = torch.arange(64) % (FACTORS[position].size - 1)
    following = sources.clone()
    following[:, position] += 1
    before, after = (rooms.images(index_of_factors(s, FACTORS)) for s in (sources, following))
    # more than 8-bit rounding somewhere, for each of the 64 rooms
    assert ((before - after).abs().amax(dim=(1, 2, 3)) > 4 / 255).all()


def test_orientation_shows_beside_a_round_object(rooms: Rooms3D) -> None:
    sphere = SHAPES.index("sphere")
    images = rooms.images(index_of_factors(torch.tensor([[0, 3, 6, 0, sphere, o] for o in range(15)]), FACTORS))
    differences = torch.cdist(images.flatten(1), images.flatten(1)) + torch.eye(15) * 10
    assert differences.min() > 0.1


def test_object_is_about_a_third_of_the_frame() -> None:
    rooms = Rooms3D(64)
    # material 2 is the object; its rows that are at least half covered somewhere
    covered = rooms._maps[:, 2].view(8, 4, 15, 64, 64).amax(dim=-1) > 0.25
    heights = covered.sum(dim=-1).float().mean(dim=(1, 2)) / 64
    assert (heights.diff() > 0).all()
    assert 0.2 < heights[0] < 1 / 3 < heights[-1] < 0.5


def test_materials_share_each_pixel(rooms: Rooms3D) -> None:
    total = rooms._maps.sum(dim=1)
    # 16 samples a pixel add up with a relative error below 16 eps
    assert total.max() <= 1.0 + 16 * torch.finfo(torch.float32).eps
    assert total.min() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_from_above_meet_the_top(shape: str) -> None:
    heights = {"cube": 0.9, "cylinder": 1.0, "sphere": 1.1, "capsule": 1.35}
    # a small offset, since a ray parallel to the axes never crosses the slabs or the tube
    down = torch.nn.functional.normalize(torch.tensor([1e-4, 1e-4, -1.0]), dim=0)[:, None]
    distance, normal = INTERSECT[shape](torch.tensor([0.0, 0.0, 3.0]), down)
    assert distance.item() == pytest.approx(3.0 - heights[shape], abs=1e-4)
    assert torch.allclose(normal[:, 0], torch.tensor([0.0, 0.0, 1.0]), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_past_the_object_miss(shape: str) -> None:
    outward = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1, 0.01]]), dim=1).T
    distance, _ = INTERSECT[shape](torch.tensor([0.0, -3.0, 0.5]), outward)
    assert distance.item() == float("inf")


def test_images_repeat(rooms: Rooms3D) -> None:
    index = held_out_split(len(rooms))[1][:64]
    assert torch.equal(rooms.images(index), Rooms3D(16).images(index))


def test_it_says_that_it_is_not_shapes3d(rooms: Rooms3D) -> None:
    assert "not Shapes3D" in rooms.describe()


@pytest.mark.parametrize("resolution", [0, 24, 128])
def test_other_resolutions_are_refused(resolution: int) -> None:
    with pytest.raises(UserError, match="16, 32 and 64"):
        Rooms3D(resolution)
