"""rooms3d: a room with one object, rendered here; nothing to download.

The six factors have the names, order and cardinalities of Shapes3D, but every pixel is our own rendering.
Geometry and shading depend on scale, shape and orientation only, which makes 480 views. Each view is kept as
four maps of reflected light, one per material (floor, wall, object, sky), and an image is their sum weighted
by the materials' colours. The highlight on the object reflects the sky, so it belongs to the sky's map.

Lengths are in units of about the object's width at scale 1. The object stands at the origin on the floor
z = 0, the walls are the planes x = ROOM and y = ROOM, and the camera swings about the room's diagonal.
"""

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize, one_hot

from qlae.data.base import Dataset, Factor, factors_of_index
from qlae.errors import UserError

RESOLUTIONS = (16, 32, 64)
SHAPES = ("cube", "cylinder", "sphere", "capsule")
FACTORS = (
    Factor("floor_hue", 10),
    Factor("wall_hue", 10),
    Factor("object_hue", 10),
    Factor("scale", 8),
    Factor("shape", len(SHAPES)),
    Factor("orientation", 15),
)
VIEWS = 8 * len(SHAPES) * 15
MATERIALS = ("floor", "wall", "object", "sky")

SCALE_RANGE = (0.75, 1.25)
ORIENTATION_RANGE_DEGREES = (-30.0, 30.0)
SATURATION, VALUE = 0.9, 1.0
SKY_COLOUR = (0.82, 0.92, 1.0)

# rays per pixel and axis
SUPERSAMPLING = 4
ROOM = 3.0
WALL_HEIGHT = 1.75
CAMERA_DISTANCE = 5.2
CAMERA_HEIGHT = 2.7
TARGET_HEIGHT = 0.75
HALF_FRAME = 0.29
LIGHT_DIRECTION = (-0.75, -0.3, 0.95)
AMBIENT, DIFFUSE = 0.5, 0.5
HIGHLIGHT, SHININESS = 0.45, 24.0
SHADOW, SHADOW_WIDTH = 0.65, 0.22


class Rooms3D(Dataset):
    """All 480,000 rooms at 16, 32 or 64 pixels; the 480 views are rendered when the set is made.

    Index and factors are related row-major in the order of `FACTORS`, orientation varying fastest.
    """

    name = "rooms3d"
    summary = "a room with one object in six factors, our own rendering, nothing to download"
    factors = FACTORS
    resolutions = RESOLUTIONS
    licence = "Apache-2.0"

    def __init__(self, resolution: int = 32, device: torch.device | str = "cpu") -> None:
        if resolution not in RESOLUTIONS:
            raise UserError(f"rooms3d has no resolution {resolution}: choose one of 16, 32 and 64 pixels")
        self.device = torch.device(device)
        self.image_shape = (3, resolution, resolution)
        self._maps = render_views(resolution).flatten(2).to(self.device)
        self._hues = hue_colours(10).to(self.device)
        self._sky = torch.tensor(SKY_COLOUR, device=self.device)

    @classmethod
    def load(
        cls, *, resolution: int | None = None, root: object = None, device: torch.device | str = "cpu"
    ) -> "Rooms3D":
        """As every set's `load`; nothing is read, so `root` has no meaning here. The default is 32 pixels."""
        return cls(32 if resolution is None else resolution, device)

    def __len__(self) -> int:
        return math.prod(factor.size for factor in self.factors)

    def images(self, index: Tensor) -> Tensor:
        index = index.to(self.device)
        hues = self.sources(index)[:, :3]
        colours = torch.cat([self._hues[hues], self._sky.expand(len(index), 1, 3)], dim=1)
        pixels = torch.einsum("bmc,bmp->bcp", colours, self._maps[index % VIEWS])
        # rounding can lift a white pixel by an ulp
        return pixels.clamp_(0.0, 1.0).view(-1, *self.image_shape)

    def sources(self, index: Tensor) -> Tensor:
        return factors_of_index(index.to(self.device), self.factors)

    def describe(self) -> str:
        _, height, width = self.image_shape
        return f"rooms3d: our own rendering (not Shapes3D), {len(self):,} images of {width} x {height} pixels"


def hue_colours(count: int) -> Tensor:
    """Evenly spaced hues as RGB, float32 [count, 3], by the usual HSV formula with this set's saturation."""
    hues = torch.arange(count) / count
    offsets = torch.tensor([5.0, 3.0, 1.0])
    position = (offsets + hues[:, None] * 6.0) % 6.0
    return VALUE * (1.0 - SATURATION * torch.minimum(position, 4.0 - position).clamp(0.0, 1.0))


def render_views(resolution: int) -> Tensor:
    """The material maps of all views, float32 [480, 4, H, W]; a pixel's four entries add up to at most 1."""
    scales = torch.linspace(*SCALE_RANGE, FACTORS[3].size).tolist()
    angles = torch.linspace(*ORIENTATION_RANGE_DEGREES, FACTORS[5].size).deg2rad().tolist()
    size = resolution * SUPERSAMPLING
    maps = torch.empty(len(scales), len(SHAPES), len(angles), len(MATERIALS), resolution, resolution)
    for orientation, angle in enumerate(angles):
        room = Room(angle, size)
        for scale, shape in product(range(len(scales)), range(len(SHAPES))):
            samples = room.furnished(SHAPES[shape], scales[scale]).view(len(MATERIALS), size, size)
            maps[scale, shape, orientation] = avg_pool2d(samples, SUPERSAMPLING)
    return maps.flatten(0, 2)


def camera_rays(angle: float, size: int) -> tuple[Tensor, Tensor]:
    """The camera's position [3] and unit ray directions [3, size * size], row by row from the top left.

    `angle` is in radians from the room's diagonal.
    """
    azimuth = math.radians(45.0) + angle
    origin = torch.tensor([-math.cos(azimuth), -math.sin(azimuth), 0.0]) * CAMERA_DISTANCE
    origin[2] = CAMERA_HEIGHT
    forward = normalize(torch.tensor([0.0, 0.0, TARGET_HEIGHT]) - origin, dim=0)
    right = normalize(torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0])), dim=0)
    up = torch.linalg.cross(right, forward)
    steps = ((torch.arange(size) + 0.5) / size * 2.0 - 1.0) * HALF_FRAME
    rows, columns = torch.meshgrid(-steps, steps, indexing="ij")
    rays = forward[:, None] + right[:, None] * columns.flatten() + up[:, None] * rows.flatten()
    return origin, normalize(rays, dim=0)


class Room:
    """The room seen from one orientation, and what an object adds to the picture."""

    def __init__(self, angle: float, size: int) -> None:
        self.light = normalize(torch.tensor(LIGHT_DIRECTION), dim=0)
        self.origin, self.rays = camera_rays(angle, size)
        to_surfaces = torch.tensor([ROOM, ROOM, 0.0]) - self.origin
        lengths = to_surfaces[:, None] / self.rays
        length, surface = torch.where(lengths > 0.0, lengths, torch.inf).min(dim=0)
        self.points = self.origin[:, None] + self.rays * length
        self.is_floor = surface == 2
        is_wall = ~self.is_floor & (self.points[2] <= WALL_HEIGHT)
        wall_light = torch.where(surface == 0, lambert(-self.light[0]), lambert(-self.light[1]))
        self.empty = torch.zeros(len(MATERIALS), self.rays.shape[1])
        self.empty[0] = self.is_floor * lambert(self.light[2])
        self.empty[1] = is_wall * wall_light
        self.empty[3] = ~self.is_floor & ~is_wall

    def furnished(self, shape: str, scale: float) -> Tensor:
        """Light per material, float32 [4, rays], with one object in the room."""
        picture = self.empty.clone()
        picture[0] *= 1.0 - SHADOW * occlusion(shape, self.points / scale)
        near = self.rays_near(shape, scale)
        rays = self.rays[:, near]
        distance, normal = INTERSECT[shape](self.origin / scale, rays)
        hit = torch.isfinite(distance)
        rays, normal = rays[:, hit], normal[:, hit]
        halfway = normalize(self.light[:, None] - rays, dim=0)
        highlight = HIGHLIGHT * (normal * halfway).sum(dim=0).clamp(min=0.0) ** SHININESS
        object_light = lambert((normal * self.light[:, None]).sum(dim=0)) * (1.0 - highlight)
        nothing = torch.zeros_like(highlight)
        picture[:, near[hit]] = torch.stack([nothing, nothing, object_light, highlight])
        return picture

    def rays_near(self, shape: str, scale: float) -> Tensor:
        """Positions, int64, of the rays that pass through the object's bounding sphere."""
        half_height, radius = HEIGHT[shape] / 2.0, RADIUS[shape]
        reach = math.hypot(half_height, radius * math.sqrt(2.0)) * scale
        offset = torch.tensor([0.0, 0.0, half_height * scale]) - self.origin
        along = (offset[:, None] * self.rays).sum(dim=0)
        return (offset.square().sum() - along.square() <= reach**2).nonzero()[:, 0]


def lambert(cosine: Tensor) -> Tensor:
    """Ambient plus diffuse light for the cosine between a surface's normal and the light; at most 1."""
    return AMBIENT + DIFFUSE * cosine.clamp(min=0.0)


def occlusion(shape: str, points: Tensor) -> Tensor:
    """How much of the sky an object of scale 1 hides from floor points [3, P]: 1 below it, 0 far away."""
    x, y = points[0], points[1]
    radius = RADIUS[shape]
    if shape in ("sphere", "capsule"):
        # seen from the floor a sphere covers cos(angle) * sin^2(half aperture) of the sky
        return (1.0 + (x * x + y * y) / radius**2) ** -1.5
    if shape == "cube":
        outside = torch.hypot((x.abs() - radius).clamp(min=0.0), (y.abs() - radius).clamp(min=0.0))
    else:
        outside = (torch.hypot(x, y) - radius).clamp(min=0.0)
    return torch.exp(-outside / SHADOW_WIDTH)


# half width and height of each shape at scale 1
RADIUS = {"cube": 0.45, "cylinder": 0.45, "sphere": 0.55, "capsule": 0.4}
HEIGHT = {"cube": 0.9, "cylinder": 1.0, "sphere": 1.1, "capsule": 1.35}


def intersect_cube(origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [P] (inf for a miss) and outward normal [3, P] on the object of scale 1; so for each shape."""
    half = RADIUS["cube"]
    from_centre = torch.tensor([0.0, 0.0, half]) - origin
    first, second = ((from_centre + side * half)[:, None] / rays for side in (-1.0, 1.0))
    entry, axis = torch.minimum(first, second).max(dim=0)
    leave = torch.maximum(first, second).amin(dim=0)
    distance = torch.where((entry <= leave) & (entry > 0.0), entry, torch.inf)
    return distance, -one_hot(axis, 3).T * rays.sign()


def intersect_sphere(origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    return ball(origin, rays, RADIUS["sphere"], RADIUS["sphere"])


def intersect_cylinder(origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    radius, height = RADIUS["cylinder"], HEIGHT["cylinder"]
    side, side_normal = tube(origin, rays, radius, 0.0, height)
    top = (height - origin[2]) / rays[2]
    crossing = origin[:2, None] + rays[:2] * top
    top = torch.where((top > 0.0) & (crossing.square().sum(dim=0) <= radius**2), top, torch.inf)
    upward = torch.tensor([0.0, 0.0, 1.0])[:, None]
    return torch.minimum(side, top), torch.where(top < side, upward, side_normal)


def intersect_capsule(origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    radius, height = RADIUS["capsule"], HEIGHT["capsule"]
    parts = (
        tube(origin, rays, radius, radius, height - radius),
        ball(origin, rays, radius, radius),
        ball(origin, rays, radius, height - radius),
    )
    distance, nearest = torch.stack([part[0] for part in parts]).min(dim=0)
    normals = torch.stack([part[1] for part in parts])
    return distance, normals.gather(0, nearest.expand(1, 3, -1))[0]


def ball(origin: Tensor, rays: Tensor, radius: float, centre_height: float) -> tuple[Tensor, Tensor]:
    """The nearer crossing with a sphere above the origin."""
    offset = origin - torch.tensor([0.0, 0.0, centre_height])
    half_slope = (offset[:, None] * rays).sum(dim=0)
    discriminant = half_slope**2 - (offset.square().sum() - radius**2)
    distance = torch.where(discriminant >= 0.0, -half_slope - discriminant.clamp(min=0.0).sqrt(), torch.inf)
    reached = torch.where(torch.isfinite(distance), distance, 0.0)
    return distance, (offset[:, None] + rays * reached) / radius


def tube(origin: Tensor, rays: Tensor, radius: float, bottom: float, top: float) -> tuple[Tensor, Tensor]:
    """The nearer crossing with the open side of an upright cylinder around the origin."""
    quadratic = rays[:2].square().sum(dim=0)
    half_slope = (origin[:2, None] * rays[:2]).sum(dim=0)
    discriminant = half_slope**2 - quadratic * (origin[:2].square().sum() - radius**2)
    reached = (-half_slope - discriminant.clamp(min=0.0).sqrt()) / quadratic
    height = origin[2] + rays[2] * reached
    distance = torch.where((discriminant >= 0.0) & (height >= bottom) & (height <= top), reached, torch.inf)
    normal = (origin[:, None] + rays * reached) / radius
    normal[2] = 0.0
    return distance, normal


INTERSECT = {
    "cube": intersect_cube,
    "cylinder": intersect_cylinder,
    "sphere": intersect_sphere,
    "capsule": intersect_capsule,
}
