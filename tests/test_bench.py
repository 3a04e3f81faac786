"""What the benchmark makes of its measurements; it is never timed here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cellseg
from cellseg.nn.unet import UNet
from speed.accuracy import differences
from speed.figures import ROWS, Figure, as_json, last_line, ratios, rows_met, table
from speed.network import count
from speed.subjects import model, tensor
from speed.timing import in_turns


def test_a_figure_is_the_median_of_its_repeats_against_a_bar() -> None:
    samples = ratios([8, 9, 1], [10, 10, 10])
    assert samples == (0.8, 0.9, 0.1)
    assert Figure(1, "a", samples, bar=0.8).met is True
    assert Figure(1, "a", samples, bar=0.81).met is False
    assert Figure(1, "a", samples, bar=0.79, at_most=True).met is False
    assert Figure(1, "a", (0.0,), bar=0, at_most=True).met is True
    assert Figure(1, "told only", samples).met is None


def test_what_could_not_be_measured_is_not_met() -> None:
    assert Figure(6, "a", bar=1, lacking="not installed").met is False
    assert Figure(6, "without a bar", lacking="not installed").met is False
    assert Figure(6, "no repeat", bar=1).met is False
    assert Figure(6, "none", (float("nan"),), bar=1).met is False


def test_a_row_is_met_where_all_its_figures_are_and_unrun_rows_are_not() -> None:
    good, told, bad = Figure(1, "a", (2.0,), 1), Figure(1, "b", (0.0,)), Figure(4, "c", (0.0,), 1)
    assert rows_met([good, told, bad]) == [1]
    assert last_line([good, told, bad]) == "rows met 1 of 7"
    assert last_line([]) == "rows met 0 of 7"
    assert last_line([Figure(row, "a", (1.0,), 1) for row in ROWS]) == "rows met 7 of 7"


def test_the_table_tells_values_bars_and_what_is_lacking() -> None:
    figures = [
        Figure(3, "x", (0.9, 0.95, 0.8), 0.9, note="9 of 10 crops/s"),
        Figure(6, "y", bar=2.5, lacking="int8 is not there"),
    ]
    lines = table(figures).splitlines()
    assert "| 3 | x | 0.9 | 0.8 to 0.95 | ≥ 0.9 | yes | 9 of 10 crops/s |" in lines
    assert "| 6 | y |  |  | ≥ 2.5 | **no** | int8 is not there |" in lines
    told = json.loads(json.dumps(as_json(figures), allow_nan=False))
    assert [figure["met"] for figure in told] == [True, False]
    assert told[0]["samples"] == [0.9, 0.95, 0.8] and told[1]["median"] is None


def test_turns_alternate_and_the_first_does_not_count() -> None:
    calls: list[str] = []

    def note(name: str) -> int:
        calls.append(name)
        return len(calls)

    assert in_turns(2, lambda: note("a"), lambda: note("b")) == [(3, 5), (4, 6)]
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize("width", [16, 24])
def test_wider_models_find_the_same_nuclei(tmp_path: Path, width: int) -> None:
    image = tensor(0, 64)
    with torch.inference_mode():
        narrow = cellseg.load("nuclei-1", "torch").task(image)
        wide = cellseg.load(model(width, tmp_path), "torch").task
        assert wide.net.head.in_channels == width
        torch.testing.assert_close(wide(image), narrow, rtol=1e-4, atol=1e-4)


def test_operations_are_counted_without_computing() -> None:
    narrow, wide = (UNet(base_channels=width, depth=1) for width in (1, 2))
    small, large = (torch.empty(1, 3, side, side) for side in (32, 64))
    # The first convolution alone: a product and a sum for each of 9 pixels in 3 channels.
    assert count(narrow, small) > 2 * 9 * 3 * 32**2
    assert count(narrow, large) == 4 * count(narrow, small)
    assert 2 < count(wide, small) / count(narrow, small) < 4


def test_labels_are_compared_pixel_by_pixel_and_by_number() -> None:
    slow = np.array([[0, 1, 1, 0, 2]])
    assert differences([slow], [slow]) == (0, 3, 0)
    assert differences([slow], [np.array([[1, 1, 1, 0, 2]])]) == (1, 4, 0)
    assert differences([slow, slow], [np.array([[0, 1, 1, 0, 0]]), slow]) == (1, 6, 1)
