"""The files of a report on scored images: JSON, CSV, Markdown, and a picture of the worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellseg.atomic import as_csv, draft, write_json, write_text
from cellseg.metrics import COUNTS, MISTAKES
from cellseg.predict.pictures import outlined, to_bytes
from cellseg.scoring.scored import (
    FEWEST_GROUPS,
    Scored,
    by_modality,
    intervals,
    resample,
    summary,
    worst,
)

# Of the table on screen: score and title.
MAIN = {
    "dice": "Dice of the foreground",
    "iou": "IoU of the foreground",
    "map": "mean AP, IoU 0.5 to 0.95",
    "ap50": "AP at IoU 0.5",
    "ap75": "AP at IoU 0.75",
    "ap90": "AP at IoU 0.9",
    "f1": "F1 at IoU 0.5",
    "pq": "panoptic quality",
    "aji": "aggregated Jaccard",
    "count_error": "error of the count",
}


def write_report(
    folder: Path,
    about: Mapping[str, Any],
    images: Sequence[Scored],
    other: Sequence[Scored] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Write `metrics.json`, `metrics.csv`, `metrics.md` and `worst.png`, and print the table.

    Args:
        folder: Where to.
        about: What else the report says: `stage`, `data`, and the like.
        images: What was scored.
        other: The same images as another method found them, to compare with.
        names: What both are called.
    """
    images = sorted(images, key=lambda image: image.id)
    samples = resample(images)
    values, limits = summary(images), intervals(samples)
    groups = len({image.group for image in images})
    facts = {**about, "images": len(images), "groups": groups}
    stage = about["stage"]
    content: dict[str, Any] = {
        **facts,
        **{f"{stage}/{name}": value for name, value in values.items()},
        "intervals": {f"{stage}/{name}": limit for name, limit in limits.items()}
        or "too few groups for an interval",
        "modalities": {
            name: {"images": len(part), **summary(part)} for name, part in by_modality(images)
        },
        "worst": [image.id for image in worst(images)],
    }
    text = table(facts, images, values, limits)
    if other is not None:
        other = sorted(other, key=lambda image: image.id)
        rest, others = summary(other), resample(other)
        change = intervals({name: samples[name] - others[name] for name in samples})
        content["other"] = {f"{stage}/{name}": value for name, value in rest.items()}
        content["difference"] = {
            f"{stage}/{name}": {"value": values[name] - rest[name], "interval": change.get(name)}
            for name in values
        }
        text += difference_table(names, values, rest, change)
    write_json(folder / "metrics.json", content)
    write_text(folder / "metrics.csv", rows(images))
    write_text(folder / "metrics.md", text)
    write_worst(folder / "worst.png", worst(images))
    print(f"\n{text}\nWritten to {folder}: metrics.json, metrics.csv, metrics.md, worst.png")


def table(
    facts: Mapping[str, Any],
    images: Sequence[Scored],
    values: Mapping[str, float],
    limits: Mapping[str, Sequence[float]],
) -> str:
    """The report as Markdown."""
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| score | mean over images | 95 % interval | pooled |", "|---|--:|--:|--:|"]
    for name, title in MAIN.items():
        low_high = "{:.3f} to {:.3f}".format(*limits[name]) if name in limits else ""
        pooled = f"{values[f'{name}_pooled']:.3f}" if f"{name}_pooled" in values else ""
        lines.append(f"| {title} | {values[name]:.3f} | {low_high} | {pooled} |")
    if not limits:
        lines += ["", f"Fewer than {FEWEST_GROUPS} groups: too few groups for an interval."]
    mistakes = ", ".join(f"{values[name]:.0f} {name}" for name in MISTAKES)
    lines += ["", f"{values['predicted']:.0f} nuclei for {values['true']:.0f}: {mistakes}."]
    if parts := by_modality(images):
        names = ("dice", "iou", "map", "ap50", "f1", "pq", "aji")
        lines += ["", f"| modality | images | {' | '.join(names)} |", f"|---|{'--:|' * 8}"]
        for modality, part in parts:
            means = summary(part)
            cells = " | ".join(f"{means[name]:.3f}" for name in names)
            lines.append(f"| {modality} | {len(part)} | {cells} |")
    lines += ["", "| worst image | mean AP | true | predicted | merged | split | missed | extra |"]
    lines += [f"|---|{'--:|' * 7}"]
    for image in worst(images):
        cells = " | ".join(f"{image.sums[name]:.0f}" for name in COUNTS)
        lines.append(f"| {image.id} | {image.scores['map']:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


def difference_table(
    names: Sequence[str],
    first: Mapping[str, float],
    second: Mapping[str, float],
    change: Mapping[str, Sequence[float]],
) -> str:
    """The comparison of two methods as Markdown."""
    head = " | ".join(names)
    lines = ["", f"| score | {head} | difference | 95 % interval |", "|---|--:|--:|--:|--:|"]
    for name, title in MAIN.items():
        low_high = "{:+.3f} to {:+.3f}".format(*change[name]) if name in change else ""
        difference = f"{first[name]:.3f} | {second[name]:.3f} | {first[name] - second[name]:+.3f}"
        lines.append(f"| {title} | {difference} | {low_high} |")
    return "\n".join(lines) + "\n"


def rows(images: Sequence[Scored]) -> str:
    """A CSV with a row an image."""
    table = [["image", "group", "modality", *COUNTS, *images[0].scores]]
    for image in images:
        numbers = [f"{image.sums[name]:g}" for name in COUNTS]
        values = [f"{value:.6g}" for value in image.scores.values()]
        table.append([image.id, image.group, image.modality, *numbers, *values])
    return as_csv(table)


def comparison(
    image: NDArray[np.float32], target: NDArray[Any], preds: NDArray[Any]
) -> NDArray[np.uint8]:
    """The image, with the outlines of the truth, and with those of the prediction.

    Args:
        image: (H, W, 3) in [0, 1].
        target: (H, W) true labels.
        preds: (H, W) predicted labels.
    """
    # Of larger images the top-left corner.
    image, target, preds = (array[:384, :384] for array in (image, target, preds))
    gap = np.full((len(image), 4, 3), 128, np.uint8)
    shown = to_bytes(image)
    return np.hstack([shown, gap, outlined(shown, target), gap, outlined(shown, preds)])


def write_worst(path: Path, images: Sequence[Scored]) -> None:
    """The pictures of the worst images below each other, each with its scores, as PNG."""
    from PIL import Image, ImageDraw

    pictures = [(image, image.picture) for image in images if image.picture is not None]
    if not pictures:
        return
    caption = 16
    width = max(480, *(picture.shape[1] for _, picture in pictures))
    height = sum(picture.shape[0] + caption for _, picture in pictures)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for image, picture in pictures:
        words = (
            f"{image.id[:24]}: mean AP {image.scores['map']:.3f}; "
            f"image, truth ({image.sums['true']:.0f}), found ({image.sums['predicted']:.0f})"
        )
        ImageDraw.Draw(sheet).text((2, top + 2), words, fill="black")
        sheet.paste(Image.fromarray(picture), (0, top + caption))
        top += picture.shape[0] + caption
    with draft(path) as name:
        sheet.save(name, "PNG")
