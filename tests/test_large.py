from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

import cellseg as package
from cellseg import model, segmenter, tiles
from cellseg.data import files
from cellseg.data.about import About
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.instances import Decoding
from cellseg.predict import nuclei, pictures, results
from cellseg.predict.drafts import Drafts
from cellseg.predict.processes import Processes
from cellseg.reading import channels, images, intensity, recording, tiff
from cellseg.reading import large as large_images
from cellseg.reading.images import read_recording, select_planes
from cellseg.reading.intensity import intensity_limits, normalise
from cellseg.reading.large import LargeImage
from cellseg.reading.recording import Windows, arrange
from conftest import cellseg, find_checkpoint

Array = NDArray[Any]
Predict = Callable[..., Path]

GREY = generate(0, size=320)[0][:300, :260, 0]
SMALL = np.asarray(Image.fromarray(GREY).resize((100, 100), Image.Resampling.BOX))
RGB = generate(2, size=320)[0][:300, :260]
STACK = np.stack(
    [generate(number, size=256, look="fluorescence")[0][..., 0] for number in range(6)]
)

# How a TIFF is written that is the same picture in every way.
TIFFS: dict[str, tuple[Array, dict[str, Any]]] = {
    "tiles": (GREY, {"tile": (64, 48), "compression": "zlib"}),
    "strips": (GREY, {"rowsperstrip": 16, "compression": "lzw"}),
    "uncompressed": (GREY, {}),
    "big": (GREY, {"bigtiff": True, "tile": (64, 64)}),
    "16 bit": (GREY.astype(np.uint16) * 200, {"tile": (64, 64), "compression": "zlib"}),
    "float": (GREY / np.float32(7), {"tile": (64, 64), "predictor": 3, "compression": "zlib"}),
    "miniswhite": (GREY, {"photometric": "miniswhite", "tile": (64, 64)}),
    "colour": (RGB, {"photometric": "rgb", "tile": (64, 64), "compression": "zlib"}),
    "jpeg": (RGB, {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg"}),
    "planar": (
        RGB.transpose(2, 0, 1).copy(),
        {"photometric": "rgb", "planarconfig": "separate", "tile": (64, 64)},
    ),
    "alpha": (
        np.dstack([RGB, RGB[..., 0]]),
        {"photometric": "rgb", "extrasamples": ["unassalpha"], "tile": (64, 64)},
    ),
    "palette": (
        GREY,
        {
            "photometric": "palette", "tile": (64, 64),
            "colormap": np.linspace(65535, 0, 768).reshape(3, 256).astype(np.uint16),
        },
    ),
    "stack": (STACK, {"imagej": True, "metadata": {"axes": "ZYX"}}),
    "ome": (
        STACK.reshape(2, 1, 3, 256, 256),
        {"ome": True, "metadata": {"axes": "TZCYX"}, "tile": (64, 64), "compression": "zlib"},
    ),
    "hyperstack": (
        STACK.reshape(3, 2, 256, 256), {"imagej": True, "metadata": {"axes": "ZCYX"}},
    ),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few tiles are large."""
    for module in (files, tiff, model):
        monkeypatch.setattr(module, "LARGE", 64 * 64)
    for module in (tiles, nuclei):
        monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(tiles, "MARGIN", 64)


@pytest.fixture
def predict(tmp_path: Path) -> Predict:
    """Predicts a folder with nuclei-1 and gives the folder of its results."""

    def run(source: Path, out: str, *more: object) -> Path:
        paths = ("--data.predict_dir", source, "--output.dir", tmp_path / out)
        assert cellseg("predict", "--data.num_workers", 0, *paths, *more) == 0
        return tmp_path / out

    return run


def large_image(pixels: NDArray[Any]) -> LargeImage:
    """A picture (H, W, 3), as if it were large."""
    return LargeImage(arrange("", pixels, "YXS", True), "all", None, (1, 99.8))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.usefixtures("small")
def test_fault_12_windows_of_a_tiff_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    data, options = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", data, **options)
    whole = read_recording(tmp_path / "a.tif")
    parts = read_recording(tmp_path / "a.tif", by_windows=True)
    assert isinstance(parts.pixels, Windows)
    assert parts.pixels.shape == whole.pixels.shape
    for name in ("planes", "plane_axes", "plane_shape", "channels", "colour", "pixel_size"):
        assert getattr(parts, name) == getattr(whole, name), name
    windows = pickle.loads(pickle.dumps(parts.pixels))  # as they come from another process
    _, height, width, _ = whole.pixels.shape
    for plane in range(len(whole.pixels)):
        for at in ((slice(0, 70), slice(30, 31)), (slice(101, height), slice(0, width))):
            np.testing.assert_array_equal(windows[plane, *at], whole.pixels[plane, *at])
    windows.close()


def assert_read_by_windows(path: Path, stack: NDArray[np.uint8]) -> None:
    windows = read_recording(path, by_windows=True).pixels
    assert isinstance(windows, Windows)
    for place, plane in enumerate(stack):
        at = (slice(0, 70), slice(30, 101))
        np.testing.assert_array_equal(windows[place, *at][..., 0], plane[at])
    windows.close()


@pytest.mark.usefixtures("small")
def test_fault_7_pages_that_were_added_one_by_one_are_read_by_windows(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for plane in STACK:
            writer.write(plane, photometric="minisblack")
    assert_read_by_windows(tmp_path / "a.tif", STACK)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 1, 3)])
@pytest.mark.usefixtures("small")
def test_axes_of_one_plane_do_not_count(shape: tuple[int, ...], tmp_path: Path) -> None:
    stack = np.resize(STACK, (math.prod(shape), *STACK.shape[1:]))
    pixels = stack.reshape(*shape, *STACK.shape[1:])
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    assert_read_by_windows(tmp_path / "a.tif", stack)


def test_a_large_image_goes_to_another_process_in_shared_memory() -> None:
    image = large_image(RGB)
    sent = ForkingPickler.dumps(image)
    assert len(sent) < RGB.nbytes / 10
    at = (slice(10, 50), slice(20, 90))
    received = pickle.loads(sent)
    assert torch.equal(received.image(0, *at), image.image(0, *at))


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.usefixtures("small")
def test_fault_12_a_large_image_is_normalised_as_the_whole(kind: str, tmp_path: Path) -> None:
    data, options = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", data, **options)
    whole = channels.to_rgb_planes(read_recording(tmp_path / "a.tif"))[0]
    image = LargeImage(read_recording(tmp_path / "a.tif", by_windows=True), "all", None, (1, 99.8))
    expected = normalise(whole, intensity_limits(whole, (1, 99.8)))
    assert image.shape == whole.shape[:3]
    at = (slice(10, 200), slice(0, 90))
    for plane in range(len(whole)):
        window = image.image(plane, *at).numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(window, expected[plane, *at])
    image.close()


def test_limits_of_a_large_image_are_those_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intensity, "LARGE", 5000)
    pixels = gaussian_filter(np.random.default_rng(0).normal(0, 9, (300, 260)), 4)
    pixels = pixels[..., None].repeat(3, 2).astype(np.float32)
    limits = intensity_limits(pixels, (1, 99.8))
    np.testing.assert_array_equal(
        large_image(pixels).image(0, slice(300), slice(260)),
        normalise(pixels, limits).transpose(2, 0, 1),
    )
    every = np.percentile(pixels, (1, 99.8))
    assert (limits[:2] != every).all()
    np.testing.assert_allclose(limits[:2], every, rtol=0.1)


@pytest.mark.parametrize("plane", ["all", "max", "2"])
@pytest.mark.usefixtures("small")
def test_planes_of_a_large_stack_are_chosen_as_of_a_small_one(plane: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, metadata={"axes": "ZYX"})
    whole = select_planes(read_recording(tmp_path / "a.tif"), plane)
    image = LargeImage(read_recording(tmp_path / "a.tif", by_windows=True), plane, None, (1, 99.8))
    assert image.shape == whole.pixels.shape[:3]
    for place, pixels in enumerate(whole.pixels):
        np.testing.assert_array_equal(image.recorded(place, slice(0, 256), slice(0, 256)), pixels)
    image.close()


def test_the_sample_is_where_the_intensities_vary_most() -> None:
    pixels = np.zeros((3000, 2500, 3), np.uint8)
    pixels[2100:2300, 1200:1500] = GREY[:200, :1, None].repeat(300, 1)
    plane, at_rows, columns = large_image(pixels).sample
    assert plane == 0
    assert at_rows.start <= 2100 < at_rows.stop
    assert columns.start <= 1200 < columns.stop


def test_fault_14_infinite_pixels_do_not_move_the_sample() -> None:
    pixels = np.zeros((3000, 2500, 3), np.float32)
    pixels[2100:2300, 1200:1500] = GREY[:200, :1, None].repeat(300, 1)
    before = large_image(pixels).sample
    pixels[4, 4], pixels[4, 6] = np.inf, -np.inf
    assert large_image(pixels).sample == before


def test_fault_14_pixels_that_are_no_numbers_are_told_of() -> None:
    pixels = RGB.astype(np.float32)
    pixels[5, 7:9] = np.nan
    assert large_image(pixels).note == "2 NaN or infinite values were left out"


@pytest.mark.parametrize("name", ["grey", "colour", "stack"])
def test_fault_12_results_of_a_large_image_are_those_of_the_whole(
    name: str, predict: Predict, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "in").mkdir()
    data = {"grey": GREY, "colour": RGB, "stack": STACK[:3]}[name]
    tags = {"stack": {"imagej": True, "metadata": {"axes": "ZYX"}}}
    tifffile.imwrite(tmp_path / "in" / "a.tif", data, **tags.get(name, {"tile": (64, 64)}))
    # A ring stops at any nucleus seen, be it at the border or not.
    borders = ("--output.expand", 3) if name != "colour" else ("--decode.exclude_border", "true")
    # What `auto` decides it decides on a tile, which may be seen otherwise than the whole.
    flags = ("--output.formats", "all", "--data.diameter", "none", *borders)
    whole = predict(tmp_path / "in", "whole", *flags)
    request.getfixturevalue("small")
    parts = predict(tmp_path / "in", "parts", *flags)

    expected = tifffile.imread(whole / "a_labels.tif")
    labels = tifffile.imread(parts / "a_labels.tif")
    assert labels.dtype == np.uint16
    assert labels.shape == expected.shape
    assert labels.max() > 5
    planes = zip(np.atleast_3d(labels.T).T, np.atleast_3d(expected.T).T, strict=True)
    numbers = []  # of each plane, from those of the parts to those of the whole
    for plane, expected_plane in planes:
        pairs = np.unique(np.stack([plane.ravel(), expected_plane.ravel()]), axis=1)
        assert pairs.shape[1] == plane.max() + 1 == expected_plane.max() + 1
        numbers.append(dict(zip(*pairs.tolist(), strict=True)))
    np.testing.assert_array_equal(
        tifffile.imread(parts / "a_probs.tif"), tifffile.imread(whole / "a_probs.tif")
    )
    # The same nuclei by other numbers.
    plane_of = {"": 0, "0": 0, "1": 1, "2": 2}
    mine = {
        (row["plane"], str(numbers[plane_of[row["plane"]]][int(row["label"])])): row
        for row in rows(parts / "objects.csv")
    }
    theirs = {(row["plane"], row["label"]): row for row in rows(whole / "objects.csv")}
    assert mine.keys() == theirs.keys()
    for key, row in theirs.items():
        for column in row.keys() - {"file", "plane", "label"}:
            # A pixel as near to two nuclei is in the ring of either.
            rel = 0.05 if "ring" in column else 1e-6
            assert float(mine[key][column]) == pytest.approx(float(row[column]), rel=rel), column
    for row, other in zip(rows(parts / "summary.csv"), rows(whole / "summary.csv"), strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}
    assert np.asarray(Image.open(parts / "a_overlay.png")).shape == (
        np.asarray(Image.open(whole / "a_overlay.png")).shape
    )
    features = [json.loads((out / "a.geojson").read_text())["features"] for out in (parts, whole)]
    assert len(features[0]) == len(features[1]) == len(theirs)
    written = {path.name for path in parts.iterdir()}
    assert written == {path.name for path in whole.iterdir()}


@pytest.mark.usefixtures("small")
def test_the_overlay_of_a_large_image_shows_it_smaller(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nuclei, "SIDE", 100)
    (tmp_path / "in").mkdir()
    picture = np.zeros((300, 260, 3), np.uint8)
    picture[:150], picture[150:, 130:] = (200, 60, 60), (60, 60, 200)  # as of stained tissue
    picture[::50, ::50] = 255  # the brightest
    tifffile.imwrite(tmp_path / "in" / "a.tif", picture, tile=(64, 64), photometric="rgb")
    out = predict(tmp_path / "in", "out", "--decode.threshold", 1)
    overlay = np.asarray(Image.open(out / "a_overlay.png")).astype(int)
    assert overlay.shape == (75, 65, 3)
    expected = normalise(picture, intensity_limits(picture, (1, 99.8)))
    cells = expected.reshape(75, 4, 65, 4, 3).mean(axis=(1, 3)) * 255
    np.testing.assert_allclose(overlay, cells, atol=1)


@pytest.mark.usefixtures("small")
def test_a_large_image_without_nuclei_still_has_its_columns(
    predict: Predict, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", np.zeros_like(GREY), tile=(64, 64))
    text = (predict(tmp_path / "in", "out") / "objects.csv").read_text()
    assert len(text.splitlines()) == 1
    assert {"area_px", "mean_0", "touches_border"} <= {*text.strip().split(",")}


@pytest.mark.usefixtures("small")
def test_outlines_of_an_image_too_large_for_them_are_left_out_with_a_word(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LARGEST_OUTLINED", 1000)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", GREY, tile=(64, 64))
    out = predict(tmp_path / "in", "out", "--output.formats", "labels,table,geojson,rle")
    assert not (out / "a.geojson").exists()
    (row,) = rows(out / "summary.csv")
    assert "geojson, rle" in row["message"]
    assert len(rows(out / "objects.csv")) == int(row["nuclei"]) > 0


@pytest.mark.usefixtures("small")
def test_labels_too_large_to_be_held_are_the_same_in_32_bits(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", GREY, tile=(64, 64))
    held = tifffile.imread(predict(tmp_path / "in", "held") / "a_labels.tif")
    monkeypatch.setattr(results, "LARGEST_NARROWED", 1000)
    streamed = tifffile.imread(predict(tmp_path / "in", "streamed") / "a_labels.tif")
    assert (held.dtype, streamed.dtype) == (np.uint16, np.uint32)
    np.testing.assert_array_equal(held, streamed)


@pytest.mark.usefixtures("small")
def test_an_array_is_predicted_as_a_file(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", RGB, tile=(64, 64), photometric="rgb")
    out = predict(tmp_path / "in", "out")
    labels = package.load().predict(RGB)
    np.testing.assert_array_equal(labels, tifffile.imread(out / "a_labels.tif"))


@pytest.mark.usefixtures("small")
def test_fault_08_of_colours_on_black_in_a_large_image_one_is_taken(
    predict: Predict, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    merge = np.stack([GREY[::-1], 0 * GREY, GREY], axis=2)
    tifffile.imwrite(tmp_path / "in" / "a.tif", merge, tile=(64, 64), photometric="rgb")
    tifffile.imwrite(tmp_path / "in" / "b.tif", GREY, tile=(64, 64))
    out = predict(tmp_path / "in", "out")
    labels = tifffile.imread(out / "b_labels.tif")
    assert labels.max() > 3
    np.testing.assert_array_equal(tifffile.imread(out / "a_labels.tif"), labels)
    np.testing.assert_array_equal(package.load().predict(merge), labels)
    assert "took blue" in rows(out / "summary.csv")[0]["message"]


@pytest.mark.parametrize(
    ("image", "diameter", "where"),
    [
        pytest.param(GREY.repeat(3, 0).repeat(3, 1), 60.0, model, id="large nuclei"),
        pytest.param(np.tile(SMALL, (3, 3)), 6.5, model, id="small nuclei"),
        pytest.param(np.tile(SMALL, (3, 3)), 6.5, segmenter, id="large where it is enlarged"),
    ],
)
def test_nuclei_of_another_size_are_found_by_tiles_as_in_the_whole(
    image: Array, diameter: float, where: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = package.load().predict(image, diameter)
    monkeypatch.setattr(where, "LARGE", 64 * 64)
    monkeypatch.setattr(tiles, "TILE", 256)
    tiled = package.load().predict(image, diameter)
    assert whole.max() > 20
    assert tiled.max() == pytest.approx(whole.max(), rel=0.03)
    assert ((tiled > 0) != (whole > 0)).mean() < 0.01


@pytest.mark.usefixtures("small")
def test_fault_31_what_cannot_be_read_by_parts_must_fit_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "memory_limit", lambda: GREY.size - 1)
    monkeypatch.setattr(tiff, "LARGEST_CHUNK", 64 * 64)
    one, many = tmp_path / "one.tif", tmp_path / "many.tif"
    tifffile.imwrite(one, GREY, compression="zlib", rowsperstrip=len(GREY))
    tifffile.imwrite(many, GREY, compression="zlib", tile=(64, 64))
    with pytest.raises(InputError, match=r"one\.tif: .*over half of this machine's memory"):
        read_recording(one, by_windows=True)
    assert read_recording(many, by_windows=True).pixels.shape == (1, 300, 260, 1)


def test_memory_is_what_control_groups_grant(tmp_path: Path) -> None:
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "slurm" / "job").mkdir(parents=True)
    (root / "slurm" / "memory.max").write_text("3000\n")
    (root / "slurm" / "job" / "memory.max").write_text("max\n")
    (root / "memory").mkdir()
    (root / "memory" / "memory.limit_in_bytes").write_text("5000\n")
    groups.write_text("4:memory:/outside/of/a/container\n3:cpu:/\n0::/slurm/job\n")
    assert sorted(recording.granted_memory(groups, root)) == [3000, 5000]
    assert list(recording.granted_memory(tmp_path / "none", root)) == []


@pytest.mark.parametrize("shape", [(16, 9000), (9000, 3)])
@pytest.mark.usefixtures("small")
def test_fault_11_a_narrow_large_image_keeps_its_shape(
    shape: tuple[int, int], predict: Predict, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", np.resize(GREY, shape), rowsperstrip=1)
    out = predict(tmp_path / "in", "out")
    assert tifffile.imread(out / "a_labels.tif").shape == shape
    with Image.open(out / "a_overlay.png") as overlay:
        assert min(overlay.size) >= 1
        assert max(overlay.size) <= pictures.SIDE


@pytest.mark.usefixtures("small")
def test_fault_26_a_large_image_in_half_precision(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", GREY, tile=(64, 64))
    out = predict(tmp_path / "in", "out", "--trainer.precision", "bf16-true")
    assert int(rows(out / "summary.csv")[0]["nuclei"]) > 3


@pytest.mark.usefixtures("small")
def test_fault_2_a_large_image_with_a_damaged_tile_is_an_error_row(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", GREY, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(tmp_path / "in" / "a.tif") as file:
        place = file.pages[0].dataoffsets[7]
    content = bytearray((tmp_path / "in" / "a.tif").read_bytes())
    content[place : place + 20] = bytes(20)
    (tmp_path / "in" / "a.tif").write_bytes(content)
    paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
    model = ("--ckpt_path", find_checkpoint(trained), "--data.num_workers", 0)
    assert cellseg("predict", *model, *paths) == 1
    (row,) = rows(tmp_path / "out" / "summary.csv")
    assert row["status"] == "error"
    assert "a.tif: cannot be read" in row["message"]
    assert not list((tmp_path / "out").glob("*.tif"))


@pytest.mark.usefixtures("small")
def test_fault_19_a_large_image_is_left_in_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", GREY, tile=(64, 64), compression="zlib")
    tiles_done = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "stopped", lambda self: "SIGTERM" if next(tiles_done) > 4 else "")
        paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
        flags = ("--data.num_workers", 0, "--output.formats", "labels,probs,table")
        assert cellseg("predict", *paths, *flags) == 143
    assert not list((tmp_path / "out").glob("*a_*"))
    assert cellseg("predict", *paths, *flags) == 0
    assert len(rows(tmp_path / "out" / "objects.csv")) > 5


def test_a_slide_is_its_image_at_full_size(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.svs") as slide:
        about = "Aperio Image Library v11\n300x260 [0,0 260x300] (64x64)|MPP = 0.5"
        options = {"photometric": "rgb", "metadata": None}
        slide.write(RGB, tile=(64, 64), description=about, **options)
        slide.write(RGB[::4, ::4], description="Aperio thumbnail", **options)
        slide.write(RGB[::2, ::2], tile=(64, 64), description=about, subfiletype=1, **options)
        slide.write(RGB[:50, :50], description="Aperio\nlabel 50x50", subfiletype=1, **options)
    assert images.is_image("a.svs")
    np.testing.assert_array_equal(read_recording(tmp_path / "a.svs").pixels[0], RGB)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_fault_12_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "benchmarks" / "large.py"
    namespace: dict[str, Any] = {"__name__": "large"}
    exec(compile(source.read_text(), source, "exec"), namespace)
    peaks = []
    # The first is high enough for as many windows at once as there ever are.
    for height in (4800, 24_000):
        path = tmp_path / f"{height}.tif"
        pixels = np.tile(GREY, (height // 300, 8))
        tifffile.imwrite(path, pixels, tile=(256, 256), compression="zlib")
        _, peak, row = namespace["predict"](path, tmp_path / str(height))
        assert int(row["nuclei"]) > 100
        peaks.append(peak)
    # A peak varies by some 100 MB; the maps and labels alone would be 480 MB more.
    assert peaks[1] - peaks[0] < 240 * 2**20


def test_a_negative_is_inverted_in_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    negative = 255 - generate(3, size=320, look="fluorescence")[0]
    whole, as_it_is = (package.load().predict(negative, "none", way) for way in (True, False))
    monkeypatch.setattr(model, "LARGE", 64 * 64)
    monkeypatch.setattr(tiles, "TILE", 128)
    tiled = package.load().predict(negative, "none", True)
    assert whole.max() > 10
    assert tiled.max() == pytest.approx(whole.max(), rel=0.05)
    assert ((tiled > 0) != (whole > 0)).mean() < 0.01 < ((as_it_is > 0) != (whole > 0)).mean()


def test_windows_of_a_large_image_are_sampled_where_the_whole_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intensity, "LARGE", 5000)  # every fourth pixel of every fourth row
    monkeypatch.setattr(large_images, "WINDOW", 50)
    pixels = gaussian_filter(np.random.default_rng(0).normal(0, 9, (300, 260)), 4)
    pixels = pixels[..., None].repeat(3, 2).astype(np.float32)
    np.testing.assert_array_equal(
        large_image(pixels).image(0, slice(300), slice(260)),
        normalise(pixels, intensity_limits(pixels, (1, 99.8))).transpose(2, 0, 1),
    )


def test_a_scale_bar_is_as_wide_as_it_is_in_the_whole_of_a_large_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, columns = np.mgrid[:96, :128]
    pixels = (rows + columns // 4).astype(np.uint8)[..., None].repeat(3, 2)
    pixels[80:88, 60:124] = 255
    monkeypatch.setattr(intensity, "LARGE", 96 * 128 // 4)  # every second pixel is looked at
    assert (normalise(pixels, intensity_limits(pixels, (1, 99.8)))[80:88, 60:124] < 0.9).all()


def test_holes_in_every_window_of_a_large_image_are_counted_and_do_not_hide_its_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_images, "WINDOW", 64)
    pixels = np.zeros((128, 128, 3), np.float32)
    pixels[70:90, 70:90] = np.random.default_rng(0).random((20, 20, 1))
    pixels[::64, ::64] = np.nan
    image = large_image(pixels)
    assert "4 NaN or infinite values were left out" in image.note
    assert image.sample == (0, slice(64, 128), slice(64, 128))


def test_the_sample_of_a_mosaic_is_not_where_its_padding_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(large_images, "WINDOW", 64)
    pixels = np.random.default_rng(0).integers(1000, 1010, (128, 128, 1)).repeat(3, 2)
    pixels[70:90, 70:90] += 300
    pixels[:, :30] = 0
    image = large_image(pixels)
    assert image.sample == (0, slice(64, 128), slice(64, 128))


def test_the_sample_of_a_large_stack_is_of_the_plane_that_varies_most(tmp_path: Path) -> None:
    stack = np.zeros((3, 40, 56), np.uint8)
    stack[0, 0, 0] = 9
    stack[2, ::2] = 200
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "ZYX"})
    image = LargeImage(read_recording(tmp_path / "a.tif"), "all", None, (1, 99.8))
    assert image.sample[0] == 2


def test_a_large_image_of_hardly_any_contrast_is_told() -> None:
    pixels = np.full((20, 20, 3), 20000, np.uint16)
    pixels[:10] += 3
    assert "hardly any contrast" in large_image(pixels).note


def test_the_maximum_of_a_large_stack_passes_over_nan(tmp_path: Path) -> None:
    planes = np.array([[[1, np.nan]], [[np.nan, 2]]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack")
    image = LargeImage(read_recording(tmp_path / "a.tif"), "max", None, (0, 100))
    assert image.recorded(0, slice(1), slice(2))[0, :, 0].tolist() == [1, 2]


@pytest.mark.parametrize("held", [0, 2**25])
def test_a_large_image_is_measured_and_written_in_its_units(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(results, "LARGEST_NARROWED", held)
    shown = np.zeros((60, 80, 3), np.uint8)
    shown[10:20, 10:22] = 200  # 120 px
    about = About(
        "a.tif", "a", (), "", (), ("", ()), ("r", "g", "b"), True, pixel_size=0.5, z_step=None,
        scale=2.0,
    )  # fmt: skip
    kept: list[str] = []
    found = nuclei.LargeNuclei(
        about,
        large_image(shown),
        lambda plane: lambda rows, columns: (shown[None, rows, columns, 0] > 0).astype(np.float32),
        Decoding(min_area=400),  # of what the network sees: 100 px here
        lambda: None,
    )
    with Drafts(tmp_path, "a") as drafts:
        formats = {"labels", "probs", "table"}
        rows = results.write_results(about, found, drafts, formats, 0, kept.append)[0]["rows"]
        labels = read_recording(drafts.written["a_labels.tif"][0])
        probs = tifffile.imread(drafts.written["a_probs.tif"][0])
    np.testing.assert_array_equal(labels.pixels[0, ..., 0], shown[..., 0] > 0)
    np.testing.assert_array_equal(probs, (shown[..., 0] > 0) * np.uint8(255))
    assert [row["nuclei"] for row in rows] == [1]
    (nucleus,) = csv.DictReader(kept[0].splitlines())
    assert float(nucleus["area_um2"]) == 120 / 4
    assert labels.pixel_size == 0.5
