from __future__ import annotations

import numpy as np
import pytest

from cellseg.data.transforms import WINDOW, Augmentation

# Far apart, so that interpolating between two of them would make a new one.
IDS = (1, 300, 1000, 30000, 65535, 7, 45000, 12, 2000)
BRIGHTNESS = np.zeros(65536, np.float32)
BRIGHTNESS[list(IDS)] = np.linspace(0.3, 1, len(IDS))


def discs(size: int = 90, radius: float = 12) -> np.ndarray:
    """A disc of each id, three in a row."""
    rows, columns = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint16)
    for number, label in enumerate(IDS):
        row, column = size / 6 * (1 + 2 * (number // 3)), size / 6 * (1 + 2 * (number % 3))
        labels[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = label
    return labels


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2).astype(np.float32)


def coordinates(height: int, width: int) -> np.ndarray:
    """An image whose pixels tell where they are."""
    rows, columns = np.mgrid[:height, :width]
    return (np.stack([rows, columns, 0 * rows], axis=2) / 256).astype(np.float32)


@pytest.fixture(scope="module")
def augmentation() -> Augmentation:
    return Augmentation(64)


def test_labels_stay_in_step_with_the_image(augmentation: Augmentation) -> None:
    labels = discs()
    image = grey(BRIGHTNESS[labels])
    agreement = []
    for seed in range(60):
        crop, cut = augmentation(image, labels, seed)
        # Colours may be inverted; blur, noise and gamma leave a correlation close to 1.
        agreement.append(abs(np.corrcoef(crop.mean(2).ravel(), BRIGHTNESS[cut].ravel())[0, 1]))
    assert min(agreement) > 0.88
    assert np.mean(agreement) > 0.96  # one pixel of shift costs 0.05


def test_no_new_label_appears(augmentation: Augmentation) -> None:
    labels = discs()
    image = grey(labels > 0)
    for seed in range(60):
        cut = augmentation(image, labels, seed)[1]
        assert cut.dtype == np.uint16
        assert cut.shape == (64, 64)
        assert set(np.unique(cut)) <= {0, *IDS}


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0, 1, 2])
def test_a_crop_is_float32_in_0_to_1(strength: float, level: float) -> None:
    vary = Augmentation(24, strength)
    image = np.clip(level + np.random.default_rng(0).normal(0, 0.3, (50, 50, 3)), 0, 1)
    for seed in range(40):
        crop, _ = vary(image.astype(np.float32), np.zeros((50, 50), np.uint16), seed)
        assert crop.dtype == np.float32
        assert crop.shape == (24, 24, 3)
        assert crop.min() >= 0 and crop.max() <= 1


def test_strength_0_cuts_a_crop_out_of_the_image_as_it_is() -> None:
    image = coordinates(60, 70)
    labels = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70)
    cut = Augmentation(16, 0)
    corners = set()
    for seed in range(30):
        crop, marks = cut(image, labels, seed)
        top, left = (round(256 * float(v)) for v in crop[0, 0, :2])
        np.testing.assert_array_equal(crop, image[top : top + 16, left : left + 16])
        np.testing.assert_array_equal(marks, labels[top : top + 16, left : left + 16])
        corners.add((top, left))
    assert len(corners) > 25


def oriented(crop: np.ndarray) -> set[bytes]:
    """A crop in its eight orientations."""
    turned = [np.rot90(crop, times) for times in range(4)]
    return {view.tobytes() for one in turned for view in (one, one[::-1])}


# So small an image has one window alone, whose middle is the crop.
SIDE = round(16 * WINDOW)
MIDDLE = slice((SIDE - 16) // 2, (SIDE - 16) // 2 + 16)


def test_all_eight_orientations_occur() -> None:
    image = coordinates(SIDE, SIDE)
    # Every other change is practically never drawn at this strength.
    turn = Augmentation(16, 1e-9)
    labels = np.zeros((SIDE, SIDE), np.uint16)
    found = {turn(image, labels, seed)[0].tobytes() for seed in range(80)}
    assert found == oriented(image[MIDDLE, MIDDLE])


def test_changes_are_drawn_independently_of_each_other() -> None:
    # `Compose.set_random_seed` gives every transform the same seed, so all take the same
    # decision: 30 % of the crops get no change at all, where independent draws leave 1.4 %.
    image = np.random.default_rng(0).random((SIDE, SIDE, 3), np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint16)
    unchanged = oriented(image[MIDDLE, MIDDLE])
    vary = Augmentation(16)
    plain = sum(vary(image, labels, seed)[0].tobytes() in unchanged for seed in range(300))
    assert plain < 15


def test_a_share_of_the_crops_is_only_cut_turned_and_mirrored() -> None:
    image = np.random.default_rng(0).random((SIDE, SIDE, 3), np.float32)
    labels = np.zeros((SIDE, SIDE), np.uint16)
    places = range(SIDE - 16 + 1)
    windows = (image[y : y + 16, x : x + 16] for y in places for x in places)
    plain = set[bytes]().union(*map(oriented, windows))

    def unchanged(share: float) -> int:
        vary = Augmentation(16, share=share)
        return sum(vary(image, labels, seed)[0].tobytes() in plain for seed in range(300))

    few = unchanged(1)  # chance leaves some as they are
    assert few < 15
    assert unchanged(0.6) == pytest.approx(0.4 * 300 + 0.6 * few, abs=35)
    assert unchanged(0) == 300


@pytest.mark.parametrize("strength", [0.2, 1.0])
def test_strength_sets_how_far_nuclei_shrink_and_grow(strength: float) -> None:
    rows, columns = np.mgrid[:90, :90]
    disc = ((rows - 45) ** 2 + (columns - 45) ** 2 < 6**2).astype(np.uint16)
    vary = Augmentation(64, strength)
    areas = np.array([vary(grey(disc), disc, seed)[1].sum() / disc.sum() for seed in range(300)])
    usual, most = (1 + 0.5 * strength) ** 2, (1 + 2 * strength) ** 2
    halfway = (1 + 0.25 * strength) ** 2
    assert areas.min() < 1 / halfway < halfway < areas.max()
    assert 0.75 < np.mean((areas > 0.9 / usual) & (areas < 1.1 * usual)) < 0.99
    # Nuclei of another magnification: a third (with mirrored copies) or three times as wide.
    assert areas.min() < 0.8 / usual
    assert areas.max() > most / 1.6
    assert areas.max() < 1.1 * usual * most


def test_colours_vary_and_are_inverted_at_times(augmentation: Augmentation) -> None:
    labels = discs()
    image = grey(0.2 + 0.5 * (labels > 0))
    inside, outside = [], []
    for seed in range(80):
        crop, cut = augmentation(image, labels, seed)
        inside.append(crop[cut > 0].mean())
        outside.append(crop[cut == 0].mean())
    darker = np.mean(np.array(inside) < np.array(outside))
    assert 0.03 < darker < 0.4
    assert np.std(inside) > 0.05


def test_some_crops_have_the_blocks_of_jpeg() -> None:
    rng = np.random.default_rng(0)
    image = grey(np.clip(0.5 + 0.2 * rng.standard_normal((SIDE * 4, SIDE * 4)), 0, 1))
    labels = np.zeros(image.shape[:2], np.uint16)
    vary = Augmentation(64)
    edges = []
    for seed in range(200):
        steps = np.abs(np.diff(vary(image, labels, seed)[0].mean(2), axis=1)).mean(0)
        edges.append(steps[7::8].mean() / np.delete(steps, np.s_[7::8]).mean())
    assert 0.03 < np.mean(np.array(edges) > 1.15) < 0.25
    assert 0.95 < np.median(edges) < 1.05


@pytest.mark.parametrize("strength", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (1, 500), (100, 7)])
def test_images_smaller_than_the_crop_are_filled_up(
    shape: tuple[int, int], strength: float
) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((*shape, 3), np.float32)
    labels = rng.integers(5, 9, shape).astype(np.uint16)
    vary = Augmentation(64, strength)
    for seed in range(5):
        crop, cut = vary(image, labels, seed)
        assert crop.shape == (64, 64, 3) and cut.shape == (64, 64)
        assert np.isfinite(crop).all()
        assert set(np.unique(cut)) <= set(np.unique(labels))  # mirrored, not filled with 0
        if strength == 0:
            colours = set(map(tuple, image.reshape(-1, 3)))
            assert set(map(tuple, crop.reshape(-1, 3))) <= colours


def test_a_seed_decides_everything_whatever_came_before() -> None:
    image = np.random.default_rng(0).random((90, 90, 3), np.float32)
    labels = discs()
    one, other = Augmentation(32), Augmentation(32)
    first = [one(image, labels, seed) for seed in range(12)]
    again = [other(image, labels, seed) for seed in reversed(range(12))][::-1]
    for (crop, cut), (same_crop, same_cut) in zip(first, again, strict=True):
        np.testing.assert_array_equal(crop, same_crop)
        np.testing.assert_array_equal(cut, same_cut)
    assert len({crop.tobytes() for crop, _ in first}) == 12


def test_the_input_is_left_as_it_is() -> None:
    image = np.random.default_rng(0).random((90, 90, 3), np.float32)
    labels = discs()
    before = image.copy(), labels.copy()
    for strength in (0, 1):
        vary = Augmentation(64, strength)
        for seed in range(20):
            crop, cut = vary(image, labels, seed)
            crop[:], cut[:] = 0, 0
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_windows_lie_inside_the_image_and_reach_its_borders() -> None:
    vary = Augmentation(10)
    rng = np.random.default_rng(0)
    tops, lefts = set(), set()
    for _ in range(200):
        rows, columns = vary.window((17, 200), rng)
        assert (rows.stop - rows.start, columns.stop - columns.start) == (14, 14)
        tops.add(rows.start)
        lefts.add(columns.start)
    assert tops == {0, 1, 2, 3}
    assert min(lefts) >= 0 and max(lefts) <= 186
    assert np.ptp(list(lefts)) > 150


def test_the_window_of_a_small_image_is_all_of_it() -> None:
    rows, columns = Augmentation(10).window((14, 3), np.random.default_rng(0))
    assert np.ones((14, 3))[rows, columns].shape == (14, 3)
