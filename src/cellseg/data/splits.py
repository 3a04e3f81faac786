"""Train, validation and test, with each field of view on one side only."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cellseg.data.groups import dsb2018, group_of, known, read_column
from cellseg.errors import InputError, few

SIDES = ("train", "val", "test")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Which sample is on which side.

    Attributes:
        name: What made it, for people.
        sides: Sample ids of `train`, `val` and `test`.
        left_out: Ids that are on no side.
    """

    name: str
    sides: Mapping[str, list[str]]
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{side} {len(self.sides[side])}" for side in SIDES)
        return f"{counts} ({self.name})"


@dataclass(frozen=True)
class Recipe:
    """How images are to be divided.

    Attributes:
        split: `auto` takes the project's split of DSB2018 where an image is in it and `random`
            otherwise; `stardist` is the split of StarDist's paper; else a CSV with the columns
            `image_id` and `split`.
        groups: What must stay on one side: a CSV with the columns `image_id` and `group`, or
            a regular expression on the id (its first group, or the whole match); by default
            the fields of DSB2018, and other images each for itself.
        folds: k-fold instead of 80/10/10: fold `fold` is the test side, the next one the
            validation side.
        fold: Which fold, from 0.
        seed: Of the random division.
    """

    split: str = "auto"
    groups: str | None = None
    folds: int = 0
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fold and not self.folds:
            raise InputError(
                f"--data.fold {self.fold}: of how many? Name their number with --data.folds"
            )
        if self.folds and self.split not in ("auto", "random"):
            raise InputError(
                f"--data.folds {self.folds} and --data.split {self.split} divide the images; "
                "leave one out"
            )
        if self.seed < 0:
            raise InputError("--data.split_seed must not be negative")

    @property
    def asked(self) -> bool:
        """Whether a division is asked for; else a checkpoint's own goes before it."""
        return self.split != "auto" or self.groups is not None or self.folds > 0


def split_in_force(
    digests: Mapping[str, str],
    stage: str,
    recipe: Recipe,
    trained: Mapping[str, Mapping[str, str]] | None = None,
    *,
    resumes: bool = False,
    own: bool = False,
    labels: bool = False,
) -> Split:
    """The first that there is: all images, what is asked for, the checkpoint's, what is usual.

    Args:
        digests: Sample id to the digest of its pixels, which tells an image of any name.
        stage: `fit`, `validate` or `test`.
        recipe: What is asked for, if anything.
        trained: Side to the digests on it, of the checkpoint, where there is one.
        resumes: Whether `fit` goes on, on the images that it began with.
        own: Whether the images of `test` are of a folder for that alone.
        labels: Whether `test` scores labels that are there, not a model.

    Raises:
        InputError: See `make_split`.
    """
    ids = list(digests)
    starts = stage == "fit" and not resumes
    if stage == "test" and own:
        return everything(ids, "test", "all images")
    if recipe.asked:
        return make_split(ids, recipe)
    if stage == "test" and labels and not any(known(i).get("split") == "test" for i in ids):
        return everything(ids, "test", "all images")
    # Whatever else it was, an image that was trained on is one of training: so that comes last.
    side_of = {digest: side for side in reversed(SIDES) for digest in (trained or {}).get(side, {})}
    if table := {sample: side_of[at] for sample, at in digests.items() if at in side_of}:
        split = _from_table(ids, table, "the checkpoint's split")
        if split.left_out and starts:
            split = extended(split, recipe.seed)
    elif trained is not None and stage != "fit":
        side = "val" if stage == "validate" else "test"
        return everything(ids, side, "all images: the checkpoint was trained on none of them")
    else:
        split = make_split(ids, recipe)  # the project's, or a random one
    if starts and not (split.sides["train"] and split.sides["val"]):  # some images of a known set
        return make_split(ids, Recipe("random", seed=recipe.seed))
    return split


def make_split(ids: Sequence[str], recipe: Recipe) -> Split:
    """Divide samples, known by their ids, into train, validation and test.

    Raises:
        InputError: Train or validation would be empty, or the recipe does not fit the samples.
    """
    split, groups = recipe.split, recipe.groups
    named = {sample: known(sample)["split"] for sample in ids if known(sample)}
    if named and not recipe.asked:
        return _from_table(ids, named, "the project's split of DSB2018, by field of view")
    if split == "stardist":
        listed = _stardist(recipe.seed)
        bare = {sample: sample.rpartition("/")[2] for sample in ids}
        named = {sample: listed[name] for sample, name in bare.items() if name in listed}
        return _from_table(ids, named, "StarDist's split of DSB2018")
    if split in ("auto", "random"):
        group = group_of(ids, groups)
        alone = [sample for sample in ids if group[sample] == sample]
        if groups and len(alone) == len(ids):
            raise InputError(f"--data.groups {groups}: groups none of the images, as {ids[0]}")
        if groups and alone:
            log.warning(f"Images that are in no group of --data.groups are one each: {few(alone)}")
        return _random(ids, group, recipe)
    table = read_column(Path(split), "split", "--data.split")
    if table.keys().isdisjoint(ids):
        raise InputError(
            f"--data.split {split}: names none of the images; the image_id of one is {ids[0]}"
        )
    chosen = _from_table(ids, table, split)
    if groups:
        sides_of: dict[str, set[str]] = defaultdict(set)
        group = group_of(ids, groups)
        for side in SIDES:
            for sample in chosen.sides[side]:
                sides_of[group[sample]].add(side)
        torn = [name for name, sides in sides_of.items() if len(sides) > 1]
        if torn:
            log.warning(
                f"--data.split {split} divides {len(torn)} groups of --data.groups, so the scores "
                f"are too high: {few(torn)}"
            )
    return chosen


def extended(split: Split, seed: int) -> Split:
    """A split in which the images that it has left out are divided too.

    Those of a known field of view join it: in training, where some of it was trained on.
    """
    placed = [(sample, side) for side in reversed(SIDES) for sample in split.sides[side]]
    group = group_of([*split.left_out, *(sample for sample, _ in placed)], None)
    side_of = {group[sample]: side for sample, side in placed}  # training comes last, and wins
    new = [sample for sample in split.left_out if group[sample] not in side_of]
    if len({group[sample] for sample in new}) < 2:  # too few to divide
        more = everything(new, "train", "more to train on")
    else:
        more = make_split(new, Recipe("random", seed=seed))
    sides = {
        side: sorted(
            [*split.sides[side], *more.sides[side]]
            + [sample for sample in split.left_out if side_of.get(group[sample]) == side]
        )
        for side in SIDES
    }
    how = more.name if new else "of the same fields of view"
    return Split(f"{split.name}, and {len(split.left_out)} more images: {how}", sides)


def everything(ids: list[str], side: str, why: str) -> Split:
    """All samples on one side."""
    return Split(why, {name: ids if name == side else [] for name in SIDES})


def _stardist(seed: int) -> dict[str, str]:
    """StarDist's training images, a tenth of them, by field, for validation, and its test."""
    side_of = {s: row["stardist"] for s, row in dsb2018().items() if row["stardist"]}
    fields = {s: dsb2018()[s]["field"] for s, side in side_of.items() if side == "train"}
    wanted = round(len(fields) / 10)
    for field_ in np.random.default_rng(seed).permutation(sorted(set(fields.values()))).tolist():
        members = [sample for sample, of in fields.items() if of == field_]
        if sum(side == "val" for side in side_of.values()) + len(members) <= wanted:
            side_of.update(dict.fromkeys(members, "val"))
    return side_of


def _from_table(ids: Sequence[str], table: Mapping[str, str], name: str) -> Split:
    sides: dict[str, list[str]] = {side: [] for side in SIDES}
    left_out = []
    for sample in ids:
        side = table.get(sample)
        if side is None:
            left_out.append(sample)
        elif side not in sides:
            raise InputError(f"{name}: '{side}' of {sample} is none of {', '.join(SIDES)}")
        else:
            sides[side].append(sample)
    return Split(name, sides, left_out)


def _random(ids: Sequence[str], groups: Mapping[str, str], recipe: Recipe) -> Split:
    if len(ids) < 2:
        raise InputError(
            f"{len(ids)} annotated image is too few to split into training and validation; "
            "annotate a second one"
        )
    folds, fold = recipe.folds, recipe.fold
    members: dict[str, list[str]] = defaultdict(list)
    for sample in ids:
        members[groups[sample]].append(sample)
    order = np.random.default_rng(recipe.seed).permutation(sorted(members)).tolist()
    if folds:
        if not 3 <= folds <= len(order) or not 0 <= fold < folds:
            raise InputError(
                f"--data.folds {folds} --data.fold {fold}: needs 3 to {len(order)} folds (the "
                "number of groups), and a fold below that"
            )
        of_fold = ("test", "val", *["train"] * (folds - 2))
        chosen = {group: of_fold[(i - fold) % folds] for i, group in enumerate(order)}
        name = f"fold {fold} of {folds}, seed {recipe.seed}"
    else:
        if len(order) < 2:
            raise InputError(
                f"--data.groups: all {len(ids)} images are in one group, or of one field of view, "
                "so nothing is left to validate on"
            )
        chosen = dict.fromkeys(order, "train")
        tenth = max(1, round(len(ids) / 10))
        queue = iter(order[:-1])  # at least one group remains to train on
        for side in ("val", "test"):
            taken = 0
            while taken < tenth and (group := next(queue, None)) is not None:
                chosen[group] = side
                taken += len(members[group])
        name = f"random 80/10/10 by group, seed {recipe.seed}"
    sides = {
        side: sorted(s for group, at in chosen.items() if at == side for s in members[group])
        for side in SIDES
    }
    return Split(name, sides)
