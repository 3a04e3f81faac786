"""Images that were compared with the truth: means, intervals, kinds, and the worst of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cellseg.metrics import COUNTS, count_error, scores

RESAMPLES = 2000
FEWEST_GROUPS = 6
WORST = 10


@dataclass(eq=False)
class Scored:
    """One image that was compared with the truth.

    Attributes:
        id: The sample's id.
        group: Its field of view: images of one are no independent evidence.
        modality: What kind of image it is, where that is known.
        sums: From `metrics.compare`.
        picture: (h, w, 3) uint8 of what is right and wrong, kept of the worst images only.
    """

    id: str
    group: str
    modality: str
    sums: Mapping[str, float]
    picture: NDArray[np.uint8] | None = field(default=None, repr=False)

    @cached_property
    def scores(self) -> dict[str, float]:
        """Its scores, with the error of its count."""
        return {**scores(self.sums), "count_error": count_error(self.sums)}


def summary(images: Sequence[Scored]) -> dict[str, float]:
    """Means over images; ending in `_pooled`, scores of all nuclei together; mistakes."""
    each = [image.scores for image in images]
    total = {name: sum(image.sums[name] for image in images) for name in images[0].sums}
    return {
        **{name: float(np.mean([s[name] for s in each])) for name in each[0]},
        **{f"{name}_pooled": value for name, value in scores(total).items()},
        **{name: total[name] for name in COUNTS},
    }


def resample(images: Sequence[Scored]) -> dict[str, NDArray[np.float64]]:
    """The scores of `RESAMPLES` bootstrap samples, drawn by group with replacement.

    Two methods on the same images get the same samples, as a paired comparison needs.

    Returns:
        Score to (RESAMPLES,); nothing where there are too few groups.
    """
    names = sorted({image.group for image in images})
    if len(names) < FEWEST_GROUPS:
        return {}
    place = {name: number for number, name in enumerate(names)}
    means, sums = list(images[0].scores), list(images[0].sums)
    table = np.zeros((len(names), 1 + len(means) + len(sums)))
    for image in images:
        table[place[image.group]] += [1, *image.scores.values(), *image.sums.values()]
    weights = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    drawn = weights @ table
    result = dict(zip(means, (drawn[:, 1 : 1 + len(means)] / drawn[:, :1]).T, strict=True))
    pooled = [scores(dict(zip(sums, row, strict=True))) for row in drawn[:, 1 + len(means) :]]
    result |= {f"{name}_pooled": np.array([row[name] for row in pooled]) for name in pooled[0]}
    return result


def intervals(samples: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    """The 2.5 and 97.5 percentiles of bootstrap samples."""
    return {name: np.percentile(values, [2.5, 97.5]).tolist() for name, values in samples.items()}


def by_modality(images: Sequence[Scored]) -> list[tuple[str, list[Scored]]]:
    """The images of each kind, where kinds are known."""
    names = sorted({image.modality for image in images if image.modality})
    return [(name, [image for image in images if image.modality == name]) for name in names]


def worst(images: Sequence[Scored]) -> list[Scored]:
    """The images of lowest mean AP."""
    return sorted(images, key=lambda image: (image.scores["map"], image.id))[:WORST]


def add(images: list[Scored], one: Scored, picture: Callable[[], NDArray[np.uint8]]) -> None:
    """Append an image, with its picture while it is among the worst: all would fill the memory."""
    pictured = [image for image in images if image.picture is not None]
    images.append(one)
    kept = worst([*pictured, one])
    if one in kept:
        one.picture = picture()
        for image in pictured:
            if image not in kept:
                image.picture = None
