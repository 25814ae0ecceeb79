"""Falcor3D: a rendered living room under changing light, seen from changing places (Nie et al. 2020)."""

from qlae.data.base import Factor
from qlae.data.labelled_pngs import LabelledPNGs, unpacked


class Falcor3D(LabelledPNGs):
    """All 233,280 images."""

    name = "falcor3d"
    title = "Falcor3D"
    summary = "a living room under changing light, renderings"
    licence = "CC BY 4.0"
    factors = (
        Factor("lighting_intensity", 5),
        Factor("lighting_x", 6),
        Factor("lighting_y", 6),
        Factor("lighting_z", 6),
        Factor("camera_x", 6),
        Factor("camera_y", 6),
        Factor("camera_z", 6),
    )
    files = unpacked(
        "Falcor3D_down128", "train-rec.labels", "https://drive.google.com/uc?id=1XAQfFK1x6cpN1eiovbP0hVfLTm5SsSoJ"
    )
