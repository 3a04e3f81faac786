"""Generated images of nuclei with exact labels: data that needs no download.

The outlines are drawn first and stay sharp; a look then turns them into a picture. The result is
a toy: good to try and test the program and to watch a network learn, not to train one for use.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.polynomial.polynomial import polyval
from numpy.typing import NDArray
from scipy.fft import irfft2, rfft2
from scipy.ndimage import fourier_gaussian, gaussian_filter
from scipy.special import expit
from skimage.color import rgb_from_hed
from skimage.measure import label

from cellseg.data.cache import pixel_digest

LOOKS = ("fluorescence", "histology")

RADII = (6.0, 16.0)  # px, of an image's mean nucleus, at every image size
COVERAGE = (0.08, 0.6)  # part of the image that its nuclei would cover if none was refused
MIN_AREA = 12  # px; less, at the image border or between neighbours, is no nucleus
MAX_OVERLAP = 0.25  # part of a new nucleus that may reach into others: pressed, never buried
MAX_REACH = 2.1  # radii from the centre to the farthest point that `_reach` allows an outline

Labels = NDArray[np.uint16]
Floats = NDArray[np.float64]


def generate(
    number: int, seed: int = 0, size: int = 256, look: str | None = None
) -> tuple[NDArray[np.uint8], Labels]:
    """One image and its exact labels, a function of the arguments alone.

    Args:
        number: Which image, from 0.
        seed: Which series of images, from 0.
        size: Side in px, from 64. Nuclei are as large in a small image as in a large one.
        look: One of `LOOKS`; by default every third image is histology.

    Returns:
        (size, size, 3) uint8 and (size, size) uint16, where 0 is the background and the ids
        1..n are consecutive. Every nucleus is one 4-connected piece of at least `MIN_AREA` px.
    """
    rng = np.random.default_rng((seed, number))
    labels, radial = _nuclei(rng, size)
    draw = {"fluorescence": _fluorescence, "histology": _histology}
    image = draw[look or LOOKS[number % 3 // 2]](rng, labels, radial)
    return (255 * np.clip(image, 0, 1)).round().astype(np.uint8), labels


def _nuclei(rng: np.random.Generator, size: int) -> tuple[Labels, Floats]:
    """Labels, and how far out each pixel lies: 0 in a nucleus's centre, 1 on its outline.

    Where two nuclei overlap, a pixel goes to the one in which it lies deeper: they meet along a
    smooth line, as if they pressed on each other.
    """
    labels = np.zeros((size, size), np.uint16)
    radial = np.ones((size, size))
    y, x = np.mgrid[:size, :size]
    plane = x + 1j * y
    mean = rng.uniform(*RADII)
    count = round(rng.uniform(*COVERAGE) * size**2 / (np.pi * mean**2))
    clustering = rng.uniform(0.1, 0.7)
    elongation, waviness = rng.uniform(0.05, (0.35, 0.18))
    placed: list[tuple[complex, float]] = []
    for _ in range(max(4, count)):  # a few at least, so that no small image stays empty
        radius = mean * np.clip(rng.lognormal(0, 0.2), 0.6, 1.6)
        centre = complex(*rng.uniform(0, size, 2))
        if placed and rng.random() < clustering:
            other, other_radius = placed[rng.integers(len(placed))]
            distance = rng.uniform(0.8, 1.05) * (other_radius + radius)  # they press or touch
            centre = complex(other + distance * np.exp(2j * np.pi * rng.random()))
        box = _box(centre, MAX_REACH * radius)
        reach = _reach(rng, (plane[box] - centre) / radius, elongation, waviness)
        inside = reach < 1
        if np.sum(inside & (labels[box] > 0)) > MAX_OVERLAP * np.sum(inside):
            continue
        placed.append((centre, radius))
        deeper = reach < radial[box]
        labels[box][deeper] = len(placed)
        radial[box][deeper] = reach[deeper]
    labels = _tidy(labels)
    radial[labels == 0] = 1
    return labels, radial


def _box(centre: complex, half: float) -> tuple[slice, slice]:
    """Rows and columns of the square around a centre; NumPy itself stops at the far edges."""
    row, column = (
        slice(max(0, int(at - half)), max(0, int(at + half) + 1))
        for at in (centre.imag, centre.real)
    )
    return row, column


def _reach(
    rng: np.random.Generator, offset: NDArray[np.complex128], elongation: float, waviness: float
) -> Floats:
    """How far out each point lies in a random wavy ellipse of unit size: 1 on its outline."""
    turned = offset * np.exp(2j * np.pi * rng.random())
    stretch = np.exp(np.clip(rng.normal(0, elongation), -0.4, 0.4))
    circle = turned.real * stretch + 1j * turned.imag / stretch
    distance = np.maximum(np.abs(circle), 1e-6)
    # A Fourier series: harmonic 1 would only shift the outline, beyond 5 it looks frayed.
    harmonics = np.arange(2, 6)
    waves = rng.normal(0, waviness / harmonics) * np.exp(2j * np.pi * rng.random(len(harmonics)))
    outline = 1 + polyval(circle / distance, [0, 0, *waves]).real
    return np.asarray(distance / np.clip(outline, 0.6, 1.4))


def _tidy(labels: Labels) -> Labels:
    """Keep the largest piece of each nucleus, if large enough, and number them anew."""
    pieces = label(labels, connectivity=1)
    areas = np.bincount(pieces.ravel())
    owners = np.zeros(len(areas), np.uint16)
    owners[pieces] = labels
    by_area = np.argsort(-areas, kind="stable")
    largest = by_area[np.unique(owners[by_area], return_index=True)[1]]
    kept = largest[(owners[largest] > 0) & (areas[largest] >= MIN_AREA)]
    ids = np.zeros(len(areas), np.uint16)
    ids[kept] = np.arange(1, len(kept) + 1)
    return np.asarray(ids[pieces])


def _fluorescence(rng: np.random.Generator, labels: Labels, radial: Floats) -> Floats:
    """Bright nuclei of varying brightness on an uneven dark background: (H, W, 3), grey."""
    size = len(labels)
    gain = rng.lognormal(0, rng.uniform(0.1, 0.4), labels.max() + 1)
    dome = 1 - rng.uniform(0.2, 0.6) * radial**3
    grain = 1 + 0.15 * _noise(rng, size, 1.5) + 0.12 * _noise(rng, size, 3)
    nuclei = (labels > 0) * gain[labels] * dome * np.clip(grain, 0.3, 2)
    glow = rng.uniform(0.1, 0.5) * gaussian_filter(nuclei, 8)
    haze = rng.uniform(0.02, 0.08) * (1 + np.clip(_noise(rng, size, 16), -1, None))
    light = 1 + 0.15 * _noise(rng, size, size / 4)
    scene = light * (gaussian_filter(nuclei, rng.uniform(0.6, 1.8)) + glow + haze)
    photons = rng.uniform(20, 200)
    seen = rng.poisson(np.clip(scene, 0, None) * photons) / photons
    seen += rng.normal(0, rng.uniform(0.005, 0.03), seen.shape)
    exposure = rng.uniform(0.3, 1) / np.percentile(scene, 99)
    return np.repeat((exposure * seen)[..., None], 3, axis=2)


def _histology(rng: np.random.Generator, labels: Labels, radial: Floats) -> Floats:
    """Purple nuclei on pink fibrous tissue with white gaps, by how stains absorb: (H, W, 3)."""
    size = len(labels)
    gain = rng.lognormal(0, 0.25, labels.max() + 1)
    fine, coarse = _noise(rng, size, 1.2), _noise(rng, size, 3)
    rim = 0.7 + 0.5 * radial**4  # the membrane stains more than the pale middle
    nuclei = (labels > 0) * gain[labels] * rim * np.clip(1 + 0.2 * (fine + coarse), 0.3, 2)
    cells = gaussian_filter((labels > 0).astype(float), 6)
    # Level lines of a smooth field run side by side, as collagen fibres do; in places only.
    fibres = np.cos(rng.uniform(8, 16) * _noise(rng, size, 30) + coarse)
    fibres *= np.clip(_noise(rng, size, 16), 0, 1)
    stroma = 0.7 + 0.25 * fibres + 0.12 * (fine + _noise(rng, size, 8))
    gaps = expit(8 * (_noise(rng, size, 16) - rng.uniform(0.8, 3))) * np.clip(1 - 4 * cells, 0, 1)
    haematoxylin = rng.uniform(0.6, 1.1) * (nuclei + 0.2 * cells)
    eosin = rng.uniform(0.25, 0.6) * np.where(labels > 0, 0.5, stroma * (1 - gaps))
    blur = rng.uniform(0.6, 1.2)
    stains = np.stack([gaussian_filter(stain, blur) for stain in (haematoxylin, eosin)], axis=2)
    light = np.exp(-stains @ (rgb_from_hed[:2] * rng.normal(1, 0.12, (2, 3))))
    return rng.uniform(0.9, 1) * light + rng.normal(0, 0.015, light.shape)


def _noise(rng: np.random.Generator, size: int, sigma: float) -> Floats:
    """White noise blurred by `sigma` px, scaled to mean 0 and variance 1: (size, size)."""
    # By Fourier, as a wide blur costs no more than a narrow one then.
    spectrum = rfft2(rng.standard_normal((size, size)))
    smooth: Floats = irfft2(fourier_gaussian(spectrum, sigma, n=size), (size, size))
    return np.asarray((smooth - smooth.mean()) / smooth.std())


class Generated:
    """A generated image as a training set's `dataset.Annotated`, drawn once when first used.

    Args:
        number: See `generate`.
    """

    def __init__(self, number: int) -> None:
        self.id = f"generated-{number:04d}"
        self.number = number

    @cached_property
    def _drawn(self) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        return generate(self.number)

    def image(self) -> NDArray[np.uint8]:
        """(size, size, 3)."""
        return self._drawn[0]

    def labels(self) -> NDArray[np.uint16]:
        """(size, size), 0 is the background."""
        return self._drawn[1]

    def digest(self) -> str:
        """As for any image, by its pixels."""
        return pixel_digest(self.image())


def write(folder: str | Path, count: int, first: int = 0) -> None:
    """Save generated images, without their labels, as PNG.

    Args:
        folder: Where to; it is made.
        count: How many.
        first: Number of the first one, see `generate`.
    """
    from PIL import Image

    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(generate(number)[0]).save(Path(folder) / f"generated-{number:04d}.png")
