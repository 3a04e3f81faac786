"""Row 7: what the fast paths cost in accuracy, on the test images of the project's split."""

from __future__ import annotations

import numpy as np

import cellseg
from cellseg.metrics import Scores, compare
from cellseg.model import Model
from cellseg.reading.recording import Array
from speed.figures import Figure
from speed.setting import Setting
from speed.subjects import SHIPPED, int8, side_of_split

PIXELS = 1e-5  # of those in a nucleus
LOSS = 0.005  # of mean AP
NAMES = (
    "OpenVINO: label pixels that differ from PyTorch's",
    "OpenVINO: nuclei gained or lost",
    "int8: loss of mean AP",
)


def measure(setting: Setting) -> list[Figure]:
    """The figures of float32 and of int8; nothing is random, so each has one sample."""
    bars = (PIXELS, 0, LOSS)
    if setting.data is None:
        lacking = "needs stage1_train.zip, see --data"
        return [
            Figure(7, name, bar=bar, at_most=True, lacking=lacking)
            for name, bar in zip(NAMES, bars, strict=True)
        ]
    annotated = side_of_split(setting.data, "test")[: 8 if setting.quick else None]
    images = [np.asarray(sample.image()) for sample in annotated]
    truth = [np.asarray(sample.labels()) for sample in annotated]
    slow = predict(cellseg.load(SHIPPED, "torch"), images)
    fast = predict(cellseg.load(SHIPPED, "openvino"), images)
    differing, inside, changed = differences(slow, fast)
    figures = [
        Figure(
            7,
            NAMES[0],
            (differing / inside,),
            PIXELS,
            at_most=True,
            note=f"{differing:,} of {inside:,} px, {len(images)} images",
        ),
        Figure(7, NAMES[1], (float(changed),), 0, at_most=True),
    ]
    quantised = int8()
    if quantised is None:
        return [*figures, Figure(7, NAMES[2], bar=LOSS, at_most=True, lacking="int8 is not there")]
    scores = [mean_ap(truth, preds) for preds in (slow, predict(quantised, images))]
    note = "{:.4f}, in int8 {:.4f}".format(*scores)
    return [*figures, Figure(7, NAMES[2], (scores[0] - scores[1],), LOSS, True, note)]


def predict(model: Model, images: list[Array]) -> list[Array]:
    """The labels of each image."""
    return [model.predict(image) for image in images]


def differences(slow: list[Array], fast: list[Array]) -> tuple[int, int, int]:
    """Label pixels that differ, of how many in any nucleus, and nuclei gained or lost.

    Labels count from the top: a nucleus gained or lost would make nearly all of them differ.
    """
    pairs = list(zip(slow, fast, strict=True))
    differing = sum(int((a != b).sum()) for a, b in pairs)
    inside = sum(int(((a > 0) | (b > 0)).sum()) for a, b in pairs)
    changed = sum(abs(int(a.max()) - int(b.max())) for a, b in pairs)
    return differing, inside, changed


def mean_ap(truth: list[Array], preds: list[Array]) -> float:
    """As `cellseg test` computes it."""
    scores = Scores()
    for target, labels in zip(truth, preds, strict=True):
        scores.update(compare(target, labels))
    return float(scores.compute()["map"])
