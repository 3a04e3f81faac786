from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from skimage.measure import label
from skimage.segmentation import find_boundaries

from cellseg.data.advice import advise_split, check_annotations, is_half_annotated
from cellseg.data.annotated import find_annotated
from cellseg.data.cache import prepare, read_sample
from cellseg.data.folders import find_samples, open_tree
from cellseg.data.masks import read_masks
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.predict.outlines import write_geojson, write_rois


def annotated(folder: Path, number: int = 3) -> NDArray[np.uint16]:
    """An image in a folder, and its labels."""
    image, labels = generate(number, size=96)
    Image.fromarray(image).save(folder / "a.png")
    return labels.astype(np.uint16)


def load_only(folder: Path) -> NDArray[np.uint16]:
    tree = open_tree(folder)
    (sample,), missing, _ = find_samples(tree)
    assert not missing
    return read_sample(tree, sample)[1]


@pytest.mark.parametrize("name", ["a_rois.zip", "a.zip", "a.png_rois.zip", "a.geojson"])
def test_corrected_outlines_beside_an_image_are_its_labels(name: str, tmp_path: Path) -> None:
    labels = annotated(tmp_path)
    if name.endswith("zip"):
        write_rois(tmp_path / name, labels)
    else:
        write_geojson(tmp_path / name, labels, {})
    np.testing.assert_array_equal(load_only(tmp_path), labels)


@pytest.mark.parametrize("mark", ["_cp_masks", "_label", "-labels", "_seg"])
def test_masks_as_other_programs_name_them_are_found(mark: str, tmp_path: Path) -> None:
    labels = annotated(tmp_path)
    Image.fromarray(labels).save(tmp_path / f"a{mark}.png")
    np.testing.assert_array_equal(load_only(tmp_path), labels)


def test_outlines_also_lie_in_a_folder_of_masks(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    labels = annotated(tmp_path / "images")
    write_rois(tmp_path / "masks" / "a.zip", labels)
    np.testing.assert_array_equal(load_only(tmp_path), labels)


def test_fault_24_two_annotations_of_one_image_are_refused_by_name(tmp_path: Path) -> None:
    labels = annotated(tmp_path)
    write_rois(tmp_path / "a_rois.zip", labels)
    Image.fromarray(labels).save(tmp_path / "a_labels.png")
    with pytest.raises(InputError, match=r"a\.png: has several masks: a_labels\.png, a_rois\.zip"):
        load_only(tmp_path)


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "binary"])
def test_fault_24_smoothed_labels_are_refused_by_name(labelled: bool, tmp_path: Path) -> None:
    labels = annotated(tmp_path)
    values = labels if labelled else (labels > 0) * 255
    mask = Image.fromarray(values.astype(np.uint8))
    mask.save(tmp_path / "a_labels.png")
    assert load_only(tmp_path).max() == (labels.max() if labelled else label(labels > 0).max())
    mask.filter(ImageFilter.GaussianBlur(1.5)).save(tmp_path / "a_labels.png")
    with pytest.raises(InputError, match=r"a_labels\.png: \d+ nuclei in \d+ pieces"):
        load_only(tmp_path)


def test_fault_24_half_annotated_images_are_noticed_and_whole_ones_are_not() -> None:
    for number in range(8):
        image, labels = generate(number, size=128)
        assert not is_half_annotated(image, labels), number
        half = labels.copy()
        half[:, 50:] = 0
        half[64:] = 0
        if half.any():
            assert is_half_annotated(image, half), number


def test_classes_of_pixels_are_refused(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.uint8)
    for left in range(4, 60, 8):  # seven nuclei with a rim
        labels[10:16, left : left + 6] = 128
        labels[12:14, left + 2 : left + 4] = 255
    Image.fromarray(labels).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "a_labels.png")
    tree = open_tree(tmp_path)
    with pytest.raises(InputError, match=r"a_labels\.png: 2 nuclei in .*classes of pixels"):
        read_masks(tree, find_samples(tree)[0][0], labels.shape)


@pytest.mark.parametrize("rim", ["inner", "outer"])
def test_classes_of_few_nuclei_and_their_rims_are_refused(rim: str, tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.uint8)
    labels[10:20, 10:20], labels[10:20, 20:30], labels[40:50, 30:40] = 1, 2, 3
    labels[60, 60] = 3  # a brush slipped
    classes = np.where(find_boundaries(labels, mode=rim), 2, labels > 0).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "a_labels.png")
    np.testing.assert_array_equal(load_only(tmp_path), labels)
    Image.fromarray(classes).save(tmp_path / "a_labels.png")
    with pytest.raises(InputError, match=r"a_labels\.png: 2 nuclei in .*classes of pixels"):
        load_only(tmp_path)


def test_masks_that_were_compressed_or_smoothed_are_as_large_as_their_nuclei(
    tmp_path: Path,
) -> None:
    _, labels = generate(2, size=96)
    (tmp_path / "a" / "masks").mkdir(parents=True)
    (tmp_path / "a" / "images").mkdir()
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "a" / "images" / "a.png")
    for number in range(1, int(labels.max()) + 1):
        mask = Image.fromarray(((labels == number) * 255).astype(np.uint8))
        mask.save(tmp_path / "a" / "masks" / f"{number:03}.jpg", quality=75)
    tree = open_tree(tmp_path)
    merged = read_masks(tree, find_samples(tree)[0][0], labels.shape)
    assert merged.max() == labels.max()
    assert (merged != labels).mean() < 0.01  # what JPEG leaves grey around nuclei is 11 %


@pytest.mark.parametrize("name", ["a_rois.zip", "a.geojson"])
def test_outlines_of_another_image_are_refused(name: str, tmp_path: Path) -> None:
    labels = np.zeros((90, 90), np.uint16)
    labels[70:80, 70:80] = 1
    labels[20:30, 70:80] = 2
    labels[20:30, 20:30] = 3
    if name.endswith("zip"):
        write_rois(tmp_path / name, labels)
    else:
        write_geojson(tmp_path / name, labels, {})
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    tree = open_tree(tmp_path)
    refused = rf"^{re.escape(name)}: 2 of 3 outlines lie outside of the image of 40 x 40 px"
    with pytest.raises(InputError, match=refused):
        read_masks(tree, find_samples(tree)[0][0], (40, 40))


def test_an_image_with_its_only_nuclei_in_a_corner_is_whole() -> None:
    image = np.full((64, 64, 3), 10, np.uint8)
    labels = np.zeros((64, 64), np.uint16)
    labels[5:15, 5:15] = 1
    image[labels > 0] = 200
    assert not is_half_annotated(image, labels)
    assert not is_half_annotated(image, labels * 0)
    hot = image.astype(np.float32)
    hot[0, :3, 0] = np.nan, np.inf, -np.inf
    assert not is_half_annotated(hot, labels)


@pytest.mark.parametrize("kind", ["bool", "uint8", "float32"])
def test_a_mask_marked_as_white_where_it_is_0_means_what_is_stored(
    kind: str, tmp_path: Path
) -> None:
    labels = generate(0, size=64)[1]
    mask = (labels > 0).astype(kind)
    tifffile.imwrite(tmp_path / "a_masks.tif", mask, photometric="miniswhite")  # as Fiji does
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "a.png")
    tree = open_tree(tmp_path)
    found = read_masks(tree, find_samples(tree)[0][0], (64, 64))
    np.testing.assert_array_equal(found > 0, labels > 0)


def test_masks_in_black_on_white_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        image, labels = generate(number, size=64)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        mask = labels == 0 if number == 1 else labels > 0
        Image.fromarray(np.uint8(mask) * 255).save(tmp_path / f"{number}_masks.png")
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    tree = open_tree(tmp_path)
    check_annotations(prepare(tree, find_samples(tree)[0], tmp_path / "cache"), to_train=False)
    assert "Images with a nucleus that reaches from border to border" in caplog.text
    assert caplog.text.rstrip().endswith("must not be 0: 1")


def test_masks_of_outlines_alone_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = annotated(tmp_path)
    labels[40:44, 40:44] = 0  # a hole in a nucleus is none
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    for mask in (labels, (labels > 0) * 255, find_boundaries(labels, mode="inner") * 255):
        assert not caplog.text
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "a_mask.png")
        tree = open_tree(tmp_path)
        check_annotations(prepare(tree, find_samples(tree)[0], tmp_path / "cache"), to_train=True)
    assert caplog.text.rstrip().endswith("counts as background; fill them: a")


def test_masks_that_are_all_empty_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen_through = np.dstack([np.zeros((96, 96, 3), np.uint8), annotated(tmp_path) > 0])
    Image.fromarray(np.uint8(255) * seen_through).save(tmp_path / "a_mask.png")
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    tree = open_tree(tmp_path)
    images = prepare(tree, find_samples(tree)[0], tmp_path / "cache")
    check_annotations(images, to_train=True)
    assert "No image has a nucleus: all masks are empty" in caplog.text


def test_folders_named_after_sides_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    advise_split(["day1/a", "train", "test2/b"])
    assert not caplog.text
    advise_split(["Train/a", "day1/a", "test/b", "test/c"])
    assert "The folders Train, test are not taken for the split" in caplog.text


def test_fijis_rois_of_any_name_are_those_of_the_only_image(tmp_path: Path) -> None:
    labels = annotated(tmp_path)
    write_rois(tmp_path / "RoiSet.zip", labels)
    np.testing.assert_array_equal(load_only(tmp_path), labels)
    Image.fromarray(labels).save(tmp_path / "a_labels.png")  # it is of a by its name
    assert find_samples(open_tree(tmp_path))[0][0].masks == ("a_labels.png",)
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    assert find_samples(open_tree(tmp_path))[1:] == (["b.png"], ["RoiSet.zip"])
    (tmp_path / "a_labels.png").unlink()
    with pytest.raises(InputError, match=r"1 mask such as RoiSet\.zip; looked for .*_rois\.zip"):
        find_samples(open_tree(tmp_path))


def test_masks_that_only_cellpose_reads_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labels = annotated(tmp_path)
    for name in ("a_seg.npy", "other_seg.npy"):
        (tmp_path / name).write_bytes(b"")
    told = "; not read: a_seg.npy, save the masks as PNG or TIFF in Cellpose"
    with pytest.raises(InputError, match=f"{told}$"):
        find_samples(open_tree(tmp_path))
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    Image.new("L", (8, 8)).save(tmp_path / "b_masks.png")
    monkeypatch.setattr(logging.getLogger("cellseg"), "propagate", True)
    find_annotated(tmp_path, 0, False, tmp_path / "cache", None, "--data.root")
    assert f"left out: a.png{told}" in caplog.text
    Image.fromarray(labels).save(tmp_path / "a_cp_masks.png")
    caplog.clear()
    find_annotated(tmp_path, 0, False, tmp_path / "cache", None, "--data.root")
    assert not caplog.text


def test_where_no_image_has_its_mask_it_is_said_what_was_seen(tmp_path: Path) -> None:
    for folder, mark in (("images", ""), ("masks", "_of_me")):
        (tmp_path / folder).mkdir()
        for name in "ab":
            Image.new("L", (8, 8)).save(tmp_path / folder / f"{name}{mark}.png")
    seen = r"2 images such as images/a\.png and 2 masks such as masks/a_of_me\.png"
    with pytest.raises(InputError, match=f"no annotated image found among {seen}; looked for"):
        find_samples(open_tree(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no annotated image found; looked for"):
        find_samples(open_tree(tmp_path / "none"))


def test_a_nucleus_outlined_in_two_parts_is_one(tmp_path: Path) -> None:
    def square(left: int) -> list[list[list[int]]]:
        return [[[left, 5], [left + 8, 5], [left + 8, 15], [left, 15], [left, 5]]]

    shape = {"type": "MultiPolygon", "coordinates": [square(5), square(20)]}
    feature = {"type": "Feature", "geometry": shape, "properties": {}}
    features = {"type": "FeatureCollection", "features": [feature]}
    (tmp_path / "a.geojson").write_text(json.dumps(features))
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "a.png")
    tree = open_tree(tmp_path)
    labels = read_masks(tree, find_samples(tree)[0][0], (40, 40))
    assert np.bincount(labels.ravel()).tolist() == [40 * 40 - 160, 160]


@pytest.mark.parametrize("binary", [False, True])
def test_a_lone_mask_beside_a_lone_image_may_be_of_all_nuclei(binary: bool, tmp_path: Path) -> None:
    image, labels = generate(3, size=96)
    apart = np.where(find_boundaries(labels), 0, labels).astype(np.uint16)
    for folder in ("images", "masks"):
        (tmp_path / "s0" / folder).mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "s0" / "images" / "image.png")
    mask = (255 * (apart > 0)).astype(np.uint8) if binary else apart
    Image.fromarray(mask).save(tmp_path / "s0" / "masks" / "mask.png")
    assert load_only(tmp_path).max() == label(apart).max() > 3


def test_a_lone_mask_with_a_soft_border_is_of_one_nucleus(tmp_path: Path) -> None:
    soft = np.zeros((20, 20), np.uint8)
    soft[5:15, 5:15], soft[6:14, 6:14], soft[7:13, 7:13] = 64, 128, 255
    for folder in ("images", "masks"):
        (tmp_path / "s0" / folder).mkdir(parents=True)
        Image.fromarray(soft).save(tmp_path / "s0" / folder / f"{folder}.png")
    assert np.bincount(load_only(tmp_path).ravel()).tolist() == [336, 64]  # from half on
