"""Isaac3D: a rendered kitchen in which a robot arm holds an object (Nie et al. 2020).

The strides in the set's README don't match its sizes; this is the order that its demonstration uses.
"""

from qlae.data.base import Factor
from qlae.data.labelled_pngs import LabelledPNGs, unpacked


class Isaac3D(LabelledPNGs):
    """All 737,280 images."""

    name = "isaac3d"
    title = "Isaac3D"
    summary = "a robot arm holds an object in a kitchen, renderings"
    licence = "CC BY 4.0"
    factors = (
        Factor("object_shape", 3),
        Factor("robot_x", 8),
        Factor("robot_y", 5),
        Factor("camera_height", 4),
        Factor("object_scale", 4),
        Factor("lighting_intensity", 4),
        Factor("lighting_y", 6),
        Factor("object_color", 4),
        Factor("wall_color", 4),
    )
    files = unpacked(
        "Isaac3D_down128", "labels.npy", "https://drive.google.com/uc?id=1OmQ1G2wnm6eTsSFGTKFZZAh5D3nQTW1B"
    )
