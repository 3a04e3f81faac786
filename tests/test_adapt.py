from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from skimage.draw import disk

import cellseg
from cellseg import segmenter as segmenters
from cellseg.adapt import is_bright, median_diameter, rescale, scale_for, to_grid
from cellseg.data.synthetic import generate
from cellseg.instances import Decoding, decode
from cellseg.metrics import compare, scores
from cellseg.segmenter import Segmentation, Segmenter, View


@pytest.mark.parametrize(
    ("diameter", "scale"),
    [
        (3, 3),
        (8, 3),
        (10, 2),
        (12, 1),
        (20, 1),
        (30, 1),
        (40, 1 / 2),
        (45, 1 / 2),
        (60, 1 / 3),
        (500, 1 / 3),
    ],
)
def test_the_scale_leads_to_nuclei_that_the_model_knows(diameter: float, scale: float) -> None:
    assert scale_for(diameter, trained=20) == scale
    assert scale_for(3 * diameter, trained=60) == scale


def test_the_median_diameter_is_that_of_equal_discs_and_none_for_too_few() -> None:
    labels = np.zeros((300, 300), np.uint16)
    for number in range(12):
        centre = (30 + 70 * (number // 4), 30 + 70 * (number % 4))
        labels[disk(centre, 20)] = number + 1
    assert median_diameter([labels]) == pytest.approx(40, rel=0.02)
    assert median_diameter([labels * (labels < 3)]) is None
    two = [labels * (labels < 3), labels * (labels < 3)]
    assert median_diameter(two) == pytest.approx(40, rel=0.02)


@pytest.mark.parametrize("scale", [2, 3])
def test_labels_enlarged_come_back_to_their_grid(scale: int) -> None:
    labels = generate(5, size=50)[1].astype(np.uint16)
    large = labels.repeat(scale, 0).repeat(scale, 1)
    np.testing.assert_array_equal(to_grid(large, labels.shape), labels)


def test_nuclei_at_the_border_are_those_that_touch_it_on_the_grid_of_the_image() -> None:
    labels = np.zeros((30, 30), np.uint16)
    labels[1:9, 12:18] = 1  # the middle of the first row of three
    labels[12:18, 12:18] = 2
    assert to_grid(labels, (10, 10))[0].any()
    alone = to_grid(labels, (10, 10), exclude_border=True)
    np.testing.assert_array_equal(alone, to_grid(labels * (labels == 2), (10, 10)))


def test_nuclei_that_a_smaller_grid_has_not_leave_no_gap() -> None:
    labels = np.zeros((30, 30), np.uint16)
    labels[0, 0], labels[10:20, 10:20] = 1, 2
    assert np.unique(to_grid(labels, (10, 10))).tolist() == [0, 1]


def test_shrinking_averages_pixels() -> None:
    image = torch.zeros(1, 1, 30, 30)
    image[..., ::3, ::3] = 9.0
    assert rescale(image, 1 / 3).shape == (1, 1, 10, 10)
    assert float(rescale(image, 1 / 3).mean()) == pytest.approx(1, rel=0.1)
    assert rescale(image, 1) is image
    assert rescale(image[..., :1, :1], 1 / 3).shape == (1, 1, 1, 1)


def test_bright_is_grey_on_a_bright_background() -> None:
    grey = torch.full((1, 3, 4, 4), 0.8)
    assert is_bright(grey)
    assert not is_bright(1 - grey)
    marked = grey.clone()
    marked[:, 0, 0, 0] = 0.2  # a pen mark
    assert is_bright(marked)
    stain = grey.clone()
    stain[:, 1] = 0.7
    assert not is_bright(stain)


def ap50(target: NDArray[Any], preds: NDArray[Any]) -> float:
    return float(scores(compare(target, preds))["ap50"])


def test_nuclei_four_times_as_large_are_found_better_by_their_estimated_diameter() -> None:
    model = cellseg.load("nuclei-1")
    found: dict[object, list[float]] = defaultdict(list)
    for number in range(4):
        image, labels = generate(number, size=160)
        large = Image.fromarray(image).resize((640, 640), Image.Resampling.BICUBIC)
        target = labels.repeat(4, 0).repeat(4, 1)
        for way in ("none", "auto", 80.0):
            found[way].append(ap50(target, model.predict(np.asarray(large), way)))  # type: ignore[arg-type]
        found["native"].append(ap50(labels, model.predict(image)))
    means = {way: float(np.mean(values)) for way, values in found.items()}
    assert means["native"] - 0.05 < means[80.0]
    assert means["none"] + 0.1 < means["auto"] <= means[80.0], means


def test_the_size_of_nuclei_is_told_by_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    segment = Segmenter.segment

    def counted(self: Segmenter, image: torch.Tensor, scale: float = 1.0) -> Segmentation:
        scales.append(scale)
        return segment(self, image, scale)

    monkeypatch.setattr(Segmenter, "segment", counted)
    model = cellseg.load("nuclei-1", "torch")
    image = generate(3, size=160)[0]
    model.predict(image)
    assert scales == [1]
    scales.clear()
    large = Image.fromarray(image).resize((640, 640), Image.Resampling.BICUBIC)
    model.predict(np.asarray(large))
    assert scales in ([1, 1 / 2], [1, 1 / 3])
    scales.clear()
    model.predict(np.asarray(large), "none")
    assert scales == [1]


@pytest.mark.parametrize("radius", [35, 55, 70])
def test_a_few_large_nuclei_are_found_without_a_flag(radius: int) -> None:
    labels = np.zeros((400, 400), np.uint16)
    for number, centre in enumerate([(80, 90), (100, 300), (300, 110), (290, 300)]):
        labels[disk(centre, radius)] = number + 1
    speckles = np.random.default_rng(0).random((80, 80)).astype(np.float32)
    texture = np.asarray(Image.fromarray(speckles).resize((400, 400)))
    image = np.where(labels > 0, 90 + 120 * texture, 10).astype(np.uint8)
    model = cellseg.load("nuclei-1", "torch")
    assert ap50(labels, model.predict(image)) == 1
    assert ap50(labels, model.predict(image, "none")) < 0.5  # in pieces


def test_most_inverted_fluorescence_is_known_without_a_flag() -> None:
    model = cellseg.load("nuclei-1")
    right = 0
    for number in range(8):
        negative = 255 - generate(number, size=128)[0]
        found = model.predict(negative, "none")
        right += (found == model.predict(negative, "none", invert=True)).all()
    assert right >= 6


def test_hardly_anything_is_found_in_fields_of_noise() -> None:
    model = cellseg.load("nuclei-1")
    rng = np.random.default_rng(0)
    fields = [rng.normal(400, 20, (256, 256)).astype(np.uint16) for _ in range(6)]
    fields += [rng.poisson(5, (256, 256)).astype(np.uint16) for _ in range(6)]
    assert sum(model.predict(field).any() for field in fields) <= 2


SIDE = 320


def segmenter(diameter: int, count: int, sure: dict[tuple[float, bool], float]) -> Segmenter:
    """Finds so many nuclei of a diameter in images of `SIDE`, and is as sure of them as it is told.

    Args:
        diameter: In px of the image as it is.
        count: How many.
        sure: Probabilities, by the scale of the image and whether it is dark.
    """

    def network(image: torch.Tensor) -> torch.Tensor:
        scale, dark = image.shape[-1] / SIDE, bool(image.mean() < 0.5)
        step = diameter * 5 // 4
        probs = torch.zeros(1, 1, SIDE, SIDE)
        for number in range(count):
            row, column = divmod(number, SIDE // step)
            centre = (step * row + step // 2, step * column + step // 2)
            probs[0, 0][disk(centre, diameter / 2)] = 1
        known = {round(f, 1): value for (f, is_dark), value in sure.items() if is_dark is dark}
        return F.interpolate(probs, image.shape[-2:]) * known[round(scale, 1)]

    return Segmenter(
        network=network,
        whole=network,
        precision=lambda: torch.autocast("cpu", enabled=False),
        depth=1,
        diameter=20.0,
        decoding=Decoding(),
        decode=decode,
    )


@pytest.mark.parametrize(
    ("diameter", "count", "as_it_is", "rescaled", "scale"),
    [
        (8, 10, 0.85, 0.90, 3),
        (8, 3, 0.85, 0.70, 3),  # less sure, but they are there
        (8, 10, 0.85, 0.10, 1),  # gone, as pieces of larger ones
        (8, 10, 0.975, 0.99, 1),  # sure enough as it is
        (8, 2, 0.85, 0.90, 1),  # too few to tell
        (11, 10, 0.85, 0.90, 1),  # not small enough for the time it takes
        (60, 3, 0.95, 0.99, 1 / 3),
        (60, 3, 0.95, 0.80, 1 / 3),
        (60, 3, 0.95, 0.10, 1),
        (60, 3, 0.975, 0.99, 1),
        (60, 2, 0.95, 0.99, 1),
        (20, 20, 0.70, 0.99, 1),  # of the size that it knows
    ],
)
def test_auto_rescales_where_the_model_is_unsure_and_finds_them_then_too(
    diameter: int, count: int, as_it_is: float, rescaled: float, scale: float
) -> None:
    other = 3 if diameter < 20 else 1 / 3
    sure = {(scale, True): rescaled for scale in (1 / 2, 1 / 3, other)}
    model = segmenter(diameter, count, {(1, True): as_it_is} | sure)
    view, found = model.find(torch.full((1, 3, SIDE, SIDE), 0.1), False, "auto")
    assert view.scale == scale
    assert found.labels.shape == (SIDE, SIDE)
    assert found.labels.max() == count
    assert view.diameter == pytest.approx(diameter, rel=0.1) or count < 3


@pytest.mark.parametrize(
    ("kept", "specks", "scale"),
    [
        (6, 0, 3),
        (6, 12, 1),
        (3, 0, 1),  # the others are gone
        (1, 0, 1),  # one blot, as large as all of them
    ],
)
def test_auto_does_not_enlarge_what_shows_other_nuclei_then(
    kept: int, specks: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    nuclei = np.zeros((SIDE, SIDE), np.uint16)
    for number in range(6):
        nuclei[disk((10, 10 + 12 * number), 4)] = number + 1
    enlarged = nuclei * (nuclei <= kept)
    if kept == 1:
        enlarged[disk((30, 30), 15)] = 1
    for number in range(specks):
        enlarged[40:43, 6 * number : 6 * number + 3] = 7 + number
    unsure = np.full((SIDE, SIDE), 0.85, np.float32)
    seen = {1.0: Segmentation(nuclei, unsure), 3.0: Segmentation(enlarged, unsure)}
    monkeypatch.setattr(segmenters, "SPARSE", 0)
    monkeypatch.setattr(Segmenter, "segment", lambda self, image, scale: seen[scale])
    image = torch.full((1, 3, SIDE, SIDE), 0.1)
    assert segmenter(8, 6, {}).find(image, False, "auto")[0].scale == scale


@pytest.mark.parametrize(
    ("diameter", "count", "scale"),
    [(45, 4, 1 / 2), (70, 4, 1 / 3), (70, 2, 1), (20, 20, 1), (11, 20, 1)],  # the last: small
)
def test_nuclei_too_large_to_be_seen_are_looked_for_in_smaller_images(
    diameter: int, count: int, scale: float
) -> None:
    sure = {1: 0, 1 / 2: 0.8, 1 / 3: 0.9}
    model = segmenter(diameter, count, {(seen, True): value for seen, value in sure.items()})
    view, found = model.find(torch.full((1, 3, SIDE, SIDE), 0.1), False, "auto")
    assert view.scale == scale
    assert found.labels.max() == (count if scale < 1 else 0)
    assert found.probs.max() == pytest.approx(sure[scale])  # seen by that scale
    assert view.diameter == (pytest.approx(diameter, rel=0.05) if scale < 1 else None)


@pytest.mark.parametrize(("covered", "sure", "scale"), [(4, 0.9, 1), (9, 0.9, 1 / 3), (9, 0.8, 1)])
def test_where_little_is_found_larger_nuclei_are_looked_for(
    covered: int, sure: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces of a size that the model knows, and seen smaller `covered` times as many pixels.
    image = torch.full((1, 3, 1000, 1000), 0.1)
    pieces, nuclei = np.zeros((2, 1000, 1000), np.uint16)
    for number in range(4):
        pieces[disk((100 + 200 * number, 100), 10)] = number + 1
        nuclei[disk((100 + 200 * number, 100), 10 * covered**0.5)] = number + 1
    probs = [np.full((1000, 1000), each, np.float32) for each in (0.85, sure)]
    seen = {1.0: Segmentation(pieces, probs[0]), 1 / 3: Segmentation(nuclei, probs[1])}
    monkeypatch.setattr(Segmenter, "segment", lambda self, image, scale: seen[scale])
    view, found = segmenter(20, 4, {}).find(image, False, "auto")
    assert view.scale == scale
    assert found is seen[scale]


def test_an_image_is_enlarged_only_where_a_part_of_it_shows_the_same_nuclei(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[float, tuple[int, ...]]] = []
    labels = np.zeros((1100, 600), np.uint16)
    for number in range(9):
        labels[disk((1000 + number // 3 * 20, 20 + number % 3 * 20), 4)] = number + 1
    again = True

    def segment(self: Segmenter, image: torch.Tensor, scale: float) -> Segmentation:
        sizes.append((scale, tuple(image.shape[2:])))
        shown = labels if image.shape[2] == 1100 else labels[512:1024, :512] * again
        return Segmentation(shown, np.full(shown.shape, 0.85, np.float32))

    monkeypatch.setattr(Segmenter, "segment", segment)
    monkeypatch.setattr(segmenters, "SPARSE", 0)
    image, model = torch.full((1, 3, 1100, 600), 0.1), segmenter(8, 6, {})
    assert model.find(image, False, "auto")[0].scale == 3
    assert sizes == [(1, (1100, 600)), (3, (512, 512)), (3, (1100, 600))]
    again = False
    sizes.clear()
    assert model.find(image, False, "auto")[0].scale == 1
    assert sizes == [(1, (1100, 600)), (3, (512, 512))]
    # What is made smaller is quick, and a part may hold too few of them.
    labels[:] = 0
    for number, centre in enumerate([(100, 100), (100, 560), (700, 100), (700, 560), (1060, 300)]):
        labels[disk(centre, 33)] = number + 1
    sizes.clear()
    assert model.find(image, False, "auto")[0].scale == 1 / 3
    assert sizes == [(1, (1100, 600)), (1 / 3, (1100, 600))]


@pytest.mark.parametrize(
    ("invert", "bright", "dark", "inverted"),
    [
        ("auto", 0.8, 0.9, True),
        ("auto", 0.9, 0.9, False),  # not surer of the negative
        ("auto", 0.9, 0.8, False),
        (True, 0.9, 0.8, True),
        (False, 0.8, 0.9, False),
    ],
)
def test_auto_inverts_where_the_model_is_surer_of_the_negative(
    invert: bool | str, bright: float, dark: float, inverted: bool
) -> None:
    model = segmenter(20, 12, {(1, False): bright, (1, True): dark})
    view, found = model.find(torch.full((1, 3, SIDE, SIDE), 0.9), invert, "none")
    assert view.inverted is inverted
    assert found.confidence == pytest.approx(dark if inverted else bright)


def test_a_dark_image_is_not_tried_as_its_negative() -> None:
    model = segmenter(20, 12, {(1, True): 0.5})  # a bright one would be a key that there is not
    assert not model.find(torch.full((1, 3, SIDE, SIDE), 0.1), "auto", "none")[0].inverted


def test_a_negative_is_seen_as_large_as_the_image_and_stays_the_negative() -> None:
    # What is not there is a key that there is not.
    bright = torch.full((1, 3, SIDE, SIDE), 0.9)
    model = segmenter(60, 12, {(1 / 3, False): 0.8, (1 / 3, True): 0.9})
    assert model.find(bright, "auto", 60.0)[0] == View(1 / 3, 60.0, True)
    model = segmenter(8, 12, {(1, False): 0.8, (1, True): 0.9, (1 / 3, True): 0, (3, True): 0.9})
    view, _ = model.find(bright, "auto", "auto")
    assert (view.scale, view.inverted) == (3, True)


def test_the_planes_of_a_stack_are_all_seen_as_the_middle_one() -> None:
    model = segmenter(60, 12, {(1 / 3, False): 0.8, (1 / 3, True): 0.9})
    stack = torch.full((3, 3, SIDE, SIDE), 0.1)
    stack[1] = 0.9
    found = model({"image": stack}, "auto", 60.0)
    assert (found["view"].scale, found["view"].inverted) == (1 / 3, True)
    assert found["probs"].max(axis=(1, 2)) == pytest.approx([0.8, 0.9, 0.8])


def test_the_network_computes_in_the_precision_that_was_asked_for() -> None:
    model, half = segmenter(20, 12, {(1, True): 0.9}), []

    def whole(image: torch.Tensor) -> torch.Tensor:
        half.append(torch.is_autocast_enabled("cpu"))
        return model.whole(image)

    asked = replace(model, whole=whole, precision=lambda: torch.autocast("cpu", torch.bfloat16))
    asked({"image": torch.full((1, 3, SIDE, SIDE), 0.1)}, False, "none")
    assert half == [True]
