from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader

from cellseg.data import files
from cellseg.data.cache import pixel_digest
from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.dataset import CropDataset, WholeImageDataset, local_labels
from cellseg.data.files import FileDataset, Reading
from cellseg.data.groups import dsb2018, origins
from cellseg.data.samplers import EndlessSampler, Share
from cellseg.data.transforms import Augmentation
from cellseg.instances import encode
from cellseg.reading.intensity import to_tensor

CROP = 16
GRADIENT = np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)
SIDE = 22  # of the window for such a crop: with an image of this size only the changes differ

# From Python 3.12 on; the workers fork before anything here starts a thread that matters.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@dataclass
class Sample:
    id: str
    pixels: np.ndarray
    marks: np.ndarray

    def image(self) -> np.ndarray:
        return self.pixels

    def labels(self) -> np.ndarray:
        return self.marks

    def digest(self) -> str:
        return pixel_digest(self.pixels)


def noise(name: str = "noise", seed: int = 0, size: int = SIDE) -> Sample:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Sample(name, pixels, rng.integers(0, 9, (size, size)).astype(np.uint16))


def crops(samples: list[Sample], strength: float = 1, seed: int = 0) -> CropDataset:
    return CropDataset(samples, Augmentation(CROP, strength), (0.0, 100.0), seed)


def content(item: dict[str, Any]) -> tuple[Any, ...]:
    return item["number"], item["id"], item["image"].numpy().tobytes(), item["labels"].tolist()


def stream(loader: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [content(item) for item in loader]


@pytest.fixture(scope="module")
def three() -> CropDataset:
    return crops([noise("small", 0), noise("large", 1, 64), noise("tiny", 2, 5)])


@forks
def test_workers_and_restarts_do_not_change_the_stream(three: CropDataset) -> None:
    expected = stream(three[number] for number in range(24))
    assert [number for number, *_ in expected] == list(range(24))
    for workers in (0, 1, 2):
        loader = DataLoader(
            three, batch_size=None, sampler=EndlessSampler(24, lambda: 0), num_workers=workers
        )
        assert stream(loader) == expected
    resumed = DataLoader(
        three, batch_size=None, sampler=EndlessSampler(14, lambda: 10), num_workers=2
    )
    assert stream(resumed) == expected[10:]


def test_an_item_depends_on_seed_and_number_alone() -> None:
    samples = [noise("a", 0, 40), noise("b", 1, 50)]
    one, other = crops(samples), crops(samples)
    assert stream(one[n] for n in range(9)) == stream(other[n] for n in reversed(range(9)))[::-1]
    different = stream(crops(samples, seed=1)[n] for n in range(9))
    assert not set(image for *_, image, _ in different) & {
        one[n]["image"].numpy().tobytes() for n in range(9)
    }


def test_a_nucleus_and_its_mirror_image_are_two() -> None:
    marks = np.zeros((12, 12), np.uint16)
    marks[4:8, 2:6] = 7  # two pixels from the border
    image = np.repeat(marks[..., None] * np.uint8(20), 3, 2)
    dataset = crops([Sample("a", image, marks)], strength=0)
    numbers = []
    for number in range(20):
        item = dataset[number]
        labels, contour = item["labels"].numpy(), item["maps"][1].numpy()
        components, count = ndimage.label(labels > 0)
        assert len(np.unique(labels)) == 1 + count
        assert contour.any() == (count > 1 and encode(components)[1].any())
        numbers.append(count)
    assert max(numbers) > 1


def two_epochs(dataset: CropDataset, crops: int = 32) -> list[bytes]:
    """All crops of two epochs over two persistent workers; the sampler's position moves on."""
    position = [0]
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=EndlessSampler(crops, lambda: position[0]),
        num_workers=2,
        persistent_workers=True,
    )
    images = []
    for _ in range(2):
        images += [item["image"].numpy().tobytes() for item in loader]
        position[0] += crops
    return images


@forks
def test_fault_27_no_two_crops_of_two_workers_and_two_epochs_are_alike() -> None:
    smooth = noise()
    smooth.pixels = cv2.GaussianBlur(smooth.pixels, (0, 0), 2)  # noise alone is left dim
    dataset = crops([smooth], strength=2)  # at 1 a few crops get no change at all
    dataset[0]  # makes the pipeline, so that both workers inherit the same
    images = two_epochs(dataset)
    assert len(images) == 64
    assert len(set(images)) == 64


class Unseeded(Augmentation):
    """What `Augmentation` would be if it left the randomness to albumentations."""

    pipeline = A.Compose([A.RandomCrop(CROP, CROP), A.GaussNoise(p=1)])

    def __call__(self, image: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Any, Any]:
        done = self.pipeline(image=image, mask=labels)
        return done["image"], done["mask"]


@forks
def test_left_to_itself_albumentations_repeats_itself_in_two_workers() -> None:
    # While this holds, the test above would fail without seeds of our own.
    images = two_epochs(CropDataset([noise()], Unseeded(CROP), (0.0, 100.0), seed=0))
    assert len(set(images)) == 32


def test_a_crop_has_the_documented_types(three: CropDataset) -> None:
    item = three[5]
    assert item["image"].shape == (3, CROP, CROP) and item["image"].dtype == torch.float32
    assert item["labels"].shape == (CROP, CROP) and item["labels"].dtype == torch.int32
    assert item["image"].is_contiguous()
    assert item["image"].min() >= 0 and item["image"].max() <= 1


def test_crops_come_from_every_image(three: CropDataset) -> None:
    ids = [three[number]["id"] for number in range(60)]
    assert min(ids.count(name) for name in ("small", "large", "tiny")) > 8


def test_images_are_drawn_by_their_weights() -> None:
    samples = [noise(name, seed) for seed, name in enumerate("abc")]
    dataset = CropDataset(samples, Augmentation(CROP, 0), (0.0, 100.0), 0, [3, 0, 1])
    drawn = Counter(dataset[number]["id"] for number in range(400))
    assert drawn.keys() == {"a", "c"}
    assert drawn["a"] / 400 == pytest.approx(0.75, abs=0.07)


def test_rare_kinds_are_drawn_more_often_when_asked_for() -> None:
    listed = dsb2018()
    kinds = {"fluorescence": 8, "histology_purple_on_white": 2}
    train = [
        sample
        for kind, count in kinds.items()
        for sample in [s for s in listed if listed[s]["modality"] == kind][:count]
    ]
    shares = {}
    for balance in (0.0, 0.5, 1.0):
        datamodule = NucleiDataModule(balance=balance, augment=0, crop_size=CROP, num_workers=0)
        datamodule.sides = {"train": [noise(name) for name in train]}
        datamodule._origins = origins(train, None)
        dataset = datamodule.train_dataloader().dataset
        rare = [dataset[n]["id"] in train[8:] for n in range(400)]
        shares[balance] = np.mean(rare)
    # Of 8 and 2 images: 2 of 10, 1 of 3 (the square roots are 1 to 2), half.
    assert shares == pytest.approx({0.0: 0.2, 0.5: 1 / 3, 1.0: 0.5}, abs=0.06)


def test_a_crop_is_normalised_by_its_whole_image() -> None:
    rows, columns = np.mgrid[:80, :100]
    pixels = np.stack([rows * 500, columns * 500, 0 * rows], axis=2).astype(np.uint16)
    marks = (rows * 100 + columns).astype(np.uint16)
    dataset = crops([Sample("ramp", pixels, marks)], strength=0)
    corners = set()
    for number in range(40):
        item = dataset[number]
        row, column = np.rint(item["image"][:2, 0, 0].numpy() * 99).astype(int)
        box = slice(row, row + CROP), slice(column, column + CROP)
        assert len(np.unique(item["labels"])) == CROP**2  # nuclei are numbered anew
        expected = pixels[box].transpose(2, 0, 1) / (99 * 500)
        np.testing.assert_allclose(item["image"].numpy(), expected, atol=1e-6)
        corners.add((row, column))
    reach = np.ptp(list(corners), axis=0)
    assert (reach > [40, 55]).all()  # of 64 and 84: from all over the image


def test_two_ranks_together_get_the_numbers_of_one() -> None:
    position = 40
    alone = list(EndlessSampler(12, lambda: position))
    assert alone == list(range(40, 52))
    ranks = [EndlessSampler(12, lambda: position, rank, 2) for rank in range(2)]
    assert [len(sampler) for sampler in ranks] == [6, 6]
    # Step by step, both ranks together take what one process takes.
    assert [n for step in zip(*ranks, strict=True) for n in step] == alone


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 12])
def test_every_rank_gets_as_many_crops(count: int, world: int) -> None:
    samplers = [EndlessSampler(count, lambda: 5, rank, world) for rank in range(world)]
    drawn = [list(sampler) for sampler in samplers]
    assert {len(numbers) for numbers in drawn} == {len(samplers[0])} == {count // world}
    together = sorted(n for numbers in drawn for n in numbers)
    assert together == list(range(5, 5 + count // world * world))


def test_the_next_epoch_starts_where_training_stands() -> None:
    position = [0]
    sampler = EndlessSampler(4, lambda: position[0])
    assert list(sampler) == [0, 1, 2, 3]
    position[0] = 4
    assert list(sampler) == [4, 5, 6, 7]
    position[0] = 6  # resumed in the middle of an epoch
    assert list(sampler) == [6, 7, 8, 9]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", range(8))
def test_each_image_is_counted_once_and_all_processes_take_part(size: int, world: int) -> None:
    shares = [Share(size, rank, world) for rank in range(world)]
    items = [list(share) for share in shares]
    assert {len(part) for part in items} == {len(share) for share in shares}
    assert len({len(part) for part in items}) == 1
    counted = [index for part in items for index, repeat in part if not repeat]
    assert sorted(counted) == list(range(size))
    repeated = [index for part in items for index, repeat in part if repeat]
    assert len(repeated) < world
    assert all(0 <= index < size for index in repeated)


@pytest.mark.parametrize("low", [0, 1])
def test_labels_above_65535_are_renumbered_within_the_crop(low: int) -> None:
    labels = np.array([[low, 70_000, 70_000], [65_536, 131_072, low]], np.int32)
    local = local_labels(labels)
    assert local.dtype == np.uint16
    # 65,536 and 131,072 would wrap around to the background.
    pairs = set(zip(labels.ravel().tolist(), local.ravel().tolist(), strict=True))
    assert len(pairs) == len({there for _, there in pairs}) == 4
    assert (local == 0).sum() == (labels == 0).sum()


def test_small_labels_keep_their_numbers() -> None:
    labels = np.array([[0, 7], [65_535, 7]], np.uint16)
    np.testing.assert_array_equal(local_labels(labels), labels)


def test_crops_of_an_image_with_very_many_nuclei_hold_distinct_labels() -> None:
    marks = 65_536 * np.arange(1, SIDE * SIDE + 1, dtype=np.int32).reshape(SIDE, SIDE)
    sample = Sample("many", noise().pixels, marks)
    labels = crops([sample], strength=0)[0]["labels"]
    assert labels.min() > 0
    assert len(labels.unique()) == CROP * CROP


def test_a_tensor_has_channels_first_and_owns_its_memory() -> None:
    image = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 2, 4) and tensor.is_contiguous()
    assert tensor[1, 0, 2] == image[0, 2, 1]


def test_whole_images_come_at_their_own_size_and_in_one_range() -> None:
    wide = Sample(
        "wide",
        np.arange(17 * 33 * 3).reshape(17, 33, 3).astype(np.uint16),
        np.eye(17, 33, dtype=np.int32) * 70_000,
    )
    dataset = WholeImageDataset([noise(), wide], (0.0, 100.0))
    assert len(dataset) == 2
    item = dataset[1, True]
    np.testing.assert_allclose(
        item["image"].numpy(), wide.pixels.transpose(2, 0, 1) / wide.pixels.max(), atol=1e-6
    )
    np.testing.assert_array_equal(item["labels"].numpy(), wide.marks)
    assert item["labels"].dtype == torch.int32
    assert (item["id"], item["repeat"]) == ("wide", True)
    assert dataset[0, False]["repeat"] is False


def test_a_bad_file_is_an_error_item_among_good_ones(tmp_path: Path) -> None:
    grey = np.arange(17 * 33, dtype=np.uint16).reshape(17, 33)
    tifffile.imwrite(tmp_path / "a.tif", grey)
    (tmp_path / "b.png").write_text("no image")
    (tmp_path / "c.png").touch()
    (tmp_path / "d.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:-40])
    (tmp_path / "e.png").mkdir()
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "a.png")
    names = ["a.tif", "b.png", "c.png", "d.tif", "e.png", "gone.png", "a.png"]
    stems = ["a.tif", "b", "c", "d", "e", "gone", "a.png"]
    files = list(zip(names, stems, strict=True))
    dataset = FileDataset(tmp_path, files, Reading((0.0, 100.0)))
    items = [dataset[index, False] for index in range(len(dataset))]
    assert [item["file"] for item in items] == names
    read = [item["about"].value for item in items if not item["error"]]
    assert [(about.file, about.stem) for about in read] == [files[0], files[-1]]
    assert not any(item["repeat"] for item in items)
    assert dataset[0, True]["repeat"]
    assert "image" not in dataset[0, True]  # another process reads it
    assert [bool(item["error"]) for item in items] == [False, *[True] * 5, False]
    for item in items[1:6]:
        assert item["file"] in item["error"]
        assert "image" not in item
    expected = np.stack([grey / grey.max()] * 3)[None]
    np.testing.assert_allclose(items[0]["image"].numpy(), expected, atol=1e-6)
    assert items[0]["about"].value.note == ""


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (17, 33), (100, 160)])
def test_a_file_keeps_its_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    Image.fromarray(np.full(shape, 9, np.uint8)).save(tmp_path / "a.png")
    image = FileDataset(tmp_path, [("a.png", "a")], Reading((1.0, 99.8)))[0, False]["image"]
    assert image.shape == (1, 3, *shape)


def test_nan_pixels_are_left_out_with_a_note(tmp_path: Path) -> None:
    pixels = np.linspace(0, 50, 600, dtype=np.float32).reshape(20, 30)
    clean = pixels.copy()
    pixels[0, :2] = np.nan, np.inf
    for name, values in (("clean.tif", clean), ("holes.tif", pixels)):
        tifffile.imwrite(tmp_path / name, values)
    dataset = FileDataset(
        tmp_path, [("clean.tif", "clean"), ("holes.tif", "holes")], Reading((1.0, 99.0))
    )
    good, holes = dataset[0, False], dataset[1, False]
    assert good["about"].value.note == "" and holes["error"] == ""
    assert "NaN or infinite" in holes["about"].value.note
    assert torch.isfinite(holes["image"]).all()
    torch.testing.assert_close(
        holes["image"][..., 1:, :], good["image"][..., 1:, :], atol=0.01, rtol=0
    )


def test_albumentations_is_imported_by_training_alone_and_told_not_to_look_for_updates() -> None:
    script = """
import os, sys
import cellseg.data.datamodule
from cellseg.data.groups import dsb2018, origins
from cellseg.data.transforms import Augmentation

crop = Augmentation(8)
assert not any(name.split(".")[0] in ("albumentations", "cv2") for name in sys.modules)

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "albumentations":
            sys.exit("NO_ALBUMENTATIONS_UPDATE=" + os.environ.get("NO_ALBUMENTATIONS_UPDATE", ""))

sys.meta_path.insert(0, Watch())
crop(None, None, 0)
"""
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.strip().splitlines()[-1:] == ["NO_ALBUMENTATIONS_UPDATE=1"]


def test_a_resume_on_fewer_devices_takes_new_crops() -> None:
    data = NucleiDataModule(synthetic=4, batch_size=8)
    data.trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=0)  # type: ignore[assignment]
    data.load_state_dict({"crops": 16000, "step": 500})  # on four
    taken = []
    for step in (0, 500, 501, 625):  # Lightning asks first where the step is not there yet
        data.trainer.global_step = step  # type: ignore[misc]
        taken.append(data._crops_taken())
    assert taken == [16000, 16000, 16008, 17000]


@pytest.mark.parametrize(
    ("pixels", "note"),
    [
        (np.float32(1) + GRADIENT / 2000, "hardly any contrast: nearly all values lie between 1.0"),
        (np.full((9, 9), 7, np.uint8), "hardly any contrast: nearly all values lie between 7 "),
        (np.float32(1) + GRADIENT / 200, ""),
        ((30000 + 100 * GRADIENT).astype(np.uint16), ""),
    ],
)
def test_an_image_of_hardly_any_contrast_is_told(
    pixels: np.ndarray, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    for large in (False, True):
        if large:
            monkeypatch.setattr(files, "LARGE", 1)
        item = FileDataset(tmp_path, [("a.tif", "a")], Reading((1.0, 99.8)))[0, False]
        assert ("large" in item) == large
        said = item["about"].value.note
        assert said.startswith(note) and bool(said) == bool(note)
