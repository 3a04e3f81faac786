from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy.ndimage import label as scipy_label

from cellseg.data import cache
from cellseg.data.cache import pixel_digest, prepare
from cellseg.data.folders import Sample, Tree, ZipTree, find_samples, open_tree
from cellseg.data.masks import merge_masks, whole_labels
from cellseg.errors import InputError
from cellseg.reading.images import read_labels
from conftest import read_image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, "PNG")
    return file.getvalue()


def kaggle(root: Path, name: str = "k", seed: int = 0) -> Path:
    """One image of two nuclei, each in a mask of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3))
    for part in ("images", "masks"):
        (root / name / part).mkdir(parents=True)
    (root / name / "images" / f"{name}.png").write_bytes(png(pixels))
    (root / name / "masks" / "n1.png").write_bytes(png(255 * (pixels[..., 0] > 200)))
    (root / name / "masks" / "n2.png").write_bytes(png(255 * (pixels[..., 0] < 50)))
    return root


def prepared(root: Path, folder: Path) -> list[cache.CachedImage]:
    tree = open_tree(root)
    return prepare(tree, find_samples(tree)[0], folder)


def contents(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.name.startswith(".") or p.is_file())


def test_masks_are_numbered_in_order_and_the_first_keeps_an_overlap() -> None:
    first = np.array([[255, 255, 0, 0, 0]], np.uint8)
    second = np.array([[0, 1, 1, 1, 0]], bool)
    third = np.array([[0, 0, 0, 7, 7]], np.uint16)
    labels = merge_masks([first, second, third])
    assert labels.tolist() == [[1, 1, 2, 2, 3]]
    assert labels.dtype == np.uint16
    assert merge_masks([third, second, first]).tolist() == [[3, 2, 2, 1, 1]]


def test_an_empty_mask_takes_no_pixel() -> None:
    empty, full = np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)
    assert not merge_masks([empty]).any()
    assert len(np.unique(merge_masks([empty, full]))) == 1


@pytest.mark.parametrize("value", [1, 255, True])
def test_a_binary_mask_becomes_its_8_connected_components(value: int) -> None:
    drawing = ["##...#", "##..#.", "......", "#....#"]
    mask = np.array([[value if c == "#" else 0 for c in row] for row in drawing])
    expected, count = scipy_label(mask, np.ones((3, 3)))
    labels = whole_labels(mask)
    assert labels.dtype == np.uint16
    assert labels.max() == count == 4
    np.testing.assert_array_equal(labels, expected)  # both number them in reading order


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32, np.int64])
def test_a_label_image_with_gaps_becomes_consecutive_and_keeps_touching_nuclei(
    dtype: type,
) -> None:
    mask = np.array([[0, 3, 3, 9], [200, 200, 3, 9]], dtype)
    labels = whole_labels(mask)
    assert labels.dtype == np.uint16
    assert labels.tolist() == [[0, 1, 1, 2], [3, 3, 1, 2]]


def test_a_mask_without_nuclei_has_no_label() -> None:
    assert whole_labels(np.zeros((3, 4), np.uint8)).tolist() == np.zeros((3, 4)).tolist()


def test_more_than_65535_nuclei_are_told_apart() -> None:
    dots = np.zeros((514, 514), np.uint8)
    dots[::2, ::2] = 255  # 257 * 257 = 66,049 nuclei of a pixel
    numbered = np.arange(66_049).reshape(257, 257) * 3
    for labels in (whole_labels(dots), whole_labels(numbered + 1)):
        assert labels.dtype == np.int32
        assert labels.max() == 66_049
        assert len(np.unique(labels[labels > 0])) == 66_049


def test_an_entry_holds_the_image_and_its_labels(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "root")
    (entry,) = prepared(root, tmp_path / "cache")
    image = read_image(root / "k/images/k.png")
    assert entry.id == "k"
    np.testing.assert_array_equal(entry.image(), image)
    expected = np.where(image[..., 0] > 200, 1, np.where(image[..., 0] < 50, 2, 0))
    np.testing.assert_array_equal(entry.labels(), expected)
    assert entry.labels().dtype == np.uint16
    assert contents(tmp_path / "cache") == ["digest.txt", "image.npy", "labels.npy"]


def test_a_second_start_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kaggle(kaggle(tmp_path / "root"), "k2", seed=1)
    first = prepared(root, tmp_path / "cache")
    assert first[0].folder != first[1].folder

    def refuse(*args: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "read_sample", refuse)
    assert prepared(root, tmp_path / "cache") == first


def test_only_missing_entries_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(kaggle(tmp_path / "root"), tmp_path / "cache")
    decoded = []
    read = cache.read_sample
    monkeypatch.setattr(
        cache, "read_sample", lambda tree, s, _: (decoded.append(s.id), read(tree, s))[1]
    )
    prepared(kaggle(tmp_path / "root", "k2", seed=1), tmp_path / "cache")
    assert decoded == ["k2"]


@pytest.mark.parametrize("zipped", [False, True])
def test_an_entry_is_known_by_content_not_by_name(tmp_path: Path, zipped: bool) -> None:
    def entry(root: Path) -> Path:
        if zipped:
            with zipfile.ZipFile(f"{root}.zip", "w") as archive:
                for path in sorted(root.rglob("*.png")):
                    archive.write(path, path.relative_to(root))
            root = Path(f"{root}.zip")
        return prepared(root, tmp_path / "cache")[0].folder

    original = entry(kaggle(tmp_path / "a"))
    assert entry(kaggle(tmp_path / "b", "renamed")) == original
    changed_image = kaggle(tmp_path / "c")
    (changed_image / "k/images/k.png").write_bytes(png(np.zeros((6, 8, 3))))
    changed_mask = kaggle(tmp_path / "d")
    (changed_mask / "k/masks/n2.png").write_bytes(png(np.zeros((6, 8))))
    fewer_masks = kaggle(tmp_path / "e")
    (fewer_masks / "k/masks/n2.png").unlink()
    others = [entry(root) for root in (changed_image, changed_mask, fewer_masks)]
    assert len({original, *others}) == 4


def test_the_same_files_read_as_one_mask_or_as_masks_are_two_entries(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(png(np.zeros((4, 4))))
    (tmp_path / "mask.png").write_bytes(png(255 * np.eye(4)[[0, 1, 3, 2]] * [1, 0, 1, 1]))
    masks = ("mask.png", "mask.png")
    both = [Sample("a", "image.png", masks, whole) for whole in (True, False)]
    one, several = prepare(Tree(tmp_path), both, tmp_path / "cache")
    assert one.labels().max() == 2
    assert several.labels().max() == 1


@pytest.mark.parametrize("shape", [(8, 6), (6, 7), (5, 8)])
def test_a_mask_of_another_size_is_refused_with_its_image(
    tmp_path: Path, shape: tuple[int, int]
) -> None:
    root = kaggle(tmp_path / "root")
    (root / "k/masks/n2.png").write_bytes(png(np.zeros(shape)))
    with pytest.raises(InputError) as caught:
        prepared(root, tmp_path / "cache")
    height, width = shape
    assert str(caught.value).startswith(f"k/masks/n2.png: {height} x {width} px")
    assert "k/images/k.png has 6 x 8" in str(caught.value)
    assert contents(tmp_path / "cache") == []


def test_pixels_that_are_no_number_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(0).random((20, 20), np.float32)
    pixels[0, :3] = np.nan, np.inf, -np.inf
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    tifffile.imwrite(tmp_path / "a_labels.tif", (pixels > 0.5).astype(np.uint8))
    with caplog.at_level("WARNING", "cellseg.data.cache"):
        prepared(tmp_path, tmp_path / "cache")
    assert "a.tif: 3 pixels are NaN or infinite" in caplog.text
    tifffile.imwrite(tmp_path / "a.tif", pixels * np.nan)
    with pytest.raises(InputError, match=r"a\.tif: no pixel is a number"):
        prepared(tmp_path, tmp_path / "cache")


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "root")
    (root / "k/masks/n2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^k/masks/n2\.png: "):
        prepared(root, tmp_path / "cache")


def test_a_full_disk_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = kaggle(tmp_path / "root")
    save = np.save

    def full(path: Path, pixels: np.ndarray) -> None:
        save(path, pixels)
        if path.name == "labels.npy":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match="No space left"):
        prepared(root, tmp_path / "cache")
    assert contents(tmp_path / "cache") == []
    monkeypatch.undo()
    assert prepared(root, tmp_path / "cache")[0].labels().max() == 2


def test_a_run_that_comes_second_takes_the_entry_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = kaggle(tmp_path / "root")
    read = cache.read_sample

    def overtaken(tree: Tree, sample: Sample, channel: str | None) -> Any:
        monkeypatch.setattr(cache, "read_sample", read)
        prepared(root, tmp_path / "cache")
        return read(tree, sample)

    monkeypatch.setattr(cache, "read_sample", overtaken)
    (entry,) = prepared(root, tmp_path / "cache")
    assert entry.labels().max() == 2
    assert contents(tmp_path / "cache") == ["digest.txt", "image.npy", "labels.npy"]


def test_processes_of_equal_number_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = kaggle(tmp_path / "root")
    write, save = cache._write, np.save

    def meanwhile(path: Path, pixels: np.ndarray) -> None:
        monkeypatch.setattr(np, "save", save)
        write(path.parents[1] / entry_name, pixels, pixels, "")
        save(path, pixels)

    (entry,) = prepared(root, tmp_path / "cache")
    entry_name = entry.folder.name
    shutil.rmtree(entry.folder)
    monkeypatch.setattr(np, "save", meanwhile)
    prepared(root, tmp_path / "cache")


def test_a_cache_below_a_file_is_refused_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{tmp_path / 'file'}.*--data.cache_dir"):
        prepared(kaggle(tmp_path / "root"), tmp_path / "file" / "cache")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write anywhere")
def test_an_unwritable_cache_is_refused_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    with pytest.raises(InputError, match=r"--data\.cache_dir"):
        prepared(kaggle(tmp_path / "root"), tmp_path / "cache")


def test_a_digest_tells_pixels_apart_and_ignores_names_and_formats(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", pixels, compression="lzw", photometric="rgb")
    one, other = (read_image(tmp_path / name) for name in ("a.png", "b.tif"))
    assert pixel_digest(one) == pixel_digest(other)
    assert len(bytes.fromhex(pixel_digest(one))) == 8
    changed = pixels.copy()
    changed[5, 7, 2] ^= 1
    lookalikes = [changed, pixels.reshape(8, 6, 3), pixels.view(np.int8)]
    assert len({pixel_digest(image) for image in (pixels, *lookalikes)}) == 4


def test_an_entry_has_the_digest_of_its_pixels(tmp_path: Path) -> None:
    root = kaggle(tmp_path / "root")
    (entry,) = prepared(root, tmp_path / "cache")
    assert entry.digest() == pixel_digest(read_image(root / "k/images/k.png"))


def test_the_digest_is_that_of_the_recording_whatever_channel_is_looked_at(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 8), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "a_labels.tif", np.eye(6, 8, dtype=np.uint16))
    tree = open_tree(tmp_path)
    samples, _, _ = find_samples(tree)
    (one,), (other,) = (prepare(tree, samples, tmp_path / "cache", channel) for channel in "01")
    assert (one.image() != other.image()).any()
    assert one.digest() == other.digest()


def dsb2018_rows() -> list[dict[str, str]]:
    """The smallest image of each modality, and one with a single nucleus."""
    with (SHARED / "dsb2018" / "split.csv").open() as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: int(row["height"]))
    kinds = {row["modality"]: row for row in reversed(rows)}
    lonely = next(row for row in rows if row["n_nuclei"] == "1")
    return [*kinds.values(), lonely]


@pytest.mark.skipif(not (SHARED / "dsb2018").is_dir(), reason=f"no DSB2018 images in {SHARED}")
def test_real_images_keep_all_their_nuclei(tmp_path: Path) -> None:
    rows = {row["image_id"]: row for row in dsb2018_rows()}
    tree = ZipTree(SHARED / "dsb2018" / "stage1_train.zip")
    samples = [sample for sample in find_samples(tree)[0] if sample.id in rows]
    assert len(samples) == len(rows) == 6
    for entry in prepare(tree, samples, tmp_path):
        row = rows[entry.id]
        assert entry.image().shape == (int(row["height"]), int(row["width"]), 3)
        assert entry.labels().shape == entry.image().shape[:2]
        nuclei = np.unique(entry.labels())
        assert np.count_nonzero(nuclei) == entry.labels().max() == int(row["n_nuclei"])


@pytest.mark.skipif(
    not (SHARED / "formats").is_dir(), reason=f"no real microscopy files in {SHARED}"
)
def test_a_real_label_image_keeps_every_nucleus() -> None:
    stored = read_labels(SHARED / "formats" / "stardist_mask2d_label16.tif")
    labels = whole_labels(stored)
    pairs = np.unique(np.stack([stored.ravel(), labels.ravel()]), axis=1)
    assert pairs.shape[1] == 126  # one to one: 125 nuclei, numbered with gaps, and background
    assert labels.max() == 125


def test_a_grey_image_has_the_digest_of_its_copy_in_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    for name, picture in (("grey", pixels), ("rgb", np.stack([pixels] * 3, axis=2))):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
        Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(tmp_path / f"{name}_labels.png")
    tree = open_tree(tmp_path)
    one, other = prepare(tree, find_samples(tree)[0], tmp_path / "cache")
    assert one.digest() == other.digest()
