from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.synthetic import generate
from cellseg.instances import Decoding, decode, encode
from cellseg.metrics import compare, scores
from cellseg.task import SegmentationTask
from cellseg.training.tuning import CANDIDATES, Tuning, tune

START = Decoding(threshold=0.6, marker=0.45, min_area=12)


def blurred(number: int, faint: float) -> tuple[np.ndarray, np.ndarray]:
    """Maps as an unsure network gives them: blurred, and with faint contours."""
    labels = generate(number)[1]
    maps = encode(labels) * np.array([0.9, faint])[:, None, None]
    return gaussian_filter(maps, (0, 0.8, 0.8)).astype(np.float16), labels


def mean_ap(predictions: list[tuple[np.ndarray, np.ndarray]], decoding: Decoding) -> float:
    each = [scores(compare(labels, decode(maps, decoding))) for maps, labels in predictions]
    return float(np.mean([s["map"] for s in each]))


def test_it_finds_levels_that_are_better_than_the_defaults() -> None:
    predictions = [blurred(number, 0.25) for number in (2, 7, 8)]
    best, score = tune(predictions, Decoding())
    assert score == pytest.approx(mean_ap(predictions, best), abs=1e-6)
    assert score > mean_ap(predictions, Decoding()) + 0.02
    # No other value of one level alone is better.
    for name, values in CANDIDATES.items():
        for value in values:
            other = Decoding(**{**vars(best), name: value})
            assert mean_ap(predictions, other) <= score + 1e-6


def test_levels_that_make_no_difference_stay_where_they_were() -> None:
    labels = np.zeros((30, 30), np.uint16)
    labels[5:20, 5:20] = 1
    assert tune([(encode(labels), labels)], START) == (START, 1.0)


def test_a_network_of_one_map_has_no_marker_level_to_tune() -> None:
    maps, labels = blurred(2, 0.5)
    assert tune([(maps[:1], labels)], START)[0].marker == START.marker


def test_tuning_looks_at_images_from_all_of_validation_as_inference_does() -> None:

    class Places:
        def __len__(self) -> int:
            return 21

        def __getitem__(self, item: tuple[int, bool]) -> dict[str, torch.Tensor]:
            image = torch.linspace(0, 1, 3 * 32 * 32).reshape(3, 32, 32)
            return {"image": image, "labels": torch.full((32, 32), item[0])}

    class Data(NucleiDataModule):
        def __init__(self) -> None:
            pass

        def whole_images(self, side: str) -> Places:
            return Places()

    trainer = SimpleNamespace(
        datamodule=Data(), world_size=1, num_val_batches=[21],
        precision_plugin=SimpleNamespace(val_step_context=nullcontext),
    )  # fmt: skip
    torch.manual_seed(0)
    task = SegmentationTask(base_channels=4, depth=2).train()
    predictions = Tuning(images=5)._predictions(trainer, task)
    assert [int(labels.max()) for _, labels in predictions] == [0, 5, 10, 15, 20]
    with torch.inference_mode():
        expected = task.eval().probs(Places()[0, False]["image"][None])[0]
    for probs, _ in predictions:
        np.testing.assert_allclose(probs, expected, atol=1e-3)
