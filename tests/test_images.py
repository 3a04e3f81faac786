from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import EpsImagePlugin, Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

from cellseg.errors import InputError
from cellseg.reading import recording as recordings
from cellseg.reading import tiff as tiffs
from cellseg.reading.channels import channels_of, colours_of, to_rgb_planes
from cellseg.reading.images import is_image, read_labels, read_recording, select_planes
from cellseg.reading.intensity import Limits, intensity_limits, noise_of, normalise
from cellseg.reading.recording import Recording, Windows
from conftest import read_image

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
RGB = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
BINARY = GREY > 127
DEEP = RNG.integers(0, 65536, (40, 56, 3), dtype=np.uint16)
SIXTEEN_COLOURS = Image.fromarray(RGB).quantize(16)
# Lossy formats need a scene without noise.
_ROWS, _COLUMNS = np.mgrid[:40, :56]
SMOOTH = np.stack([4 * _COLUMNS, 6 * _ROWS, 250 - 2 * _ROWS - _COLUMNS], axis=2).astype(np.uint8)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "RNG", np.random.default_rng(7))


def pillow(pixels: Any, file_format: str, **options: Any) -> bytes:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def deep_png(pixels: np.ndarray) -> bytes:
    # Pillow writes no 16-bit colour; OpenCV has blue first.
    return bytes(cv2.imencode(".png", pixels[..., [2, 1, 0, 3][: pixels.shape[2]]])[1])


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    alpha = np.full(pixels.shape[:2], np.iinfo(pixels.dtype).max // 3, pixels.dtype)
    return np.dstack([pixels, alpha])


def thrice(pixels: np.ndarray) -> np.ndarray:
    return np.stack([pixels] * 3, axis=2)


OF_16 = np.asarray(SIXTEEN_COLOURS.convert("RGB"))
GREY_ALPHA = Image.fromarray(with_alpha(GREY))
BILEVEL = Image.fromarray(BINARY)
PLANES = np.moveaxis(RGB, 2, 0)

# Each file as another library writes it, beside the RGB picture that it shows.
LOSSLESS = {
    "PNG, RGB": (pillow(RGB, "PNG"), RGB),
    "PNG, grey": (pillow(GREY, "PNG"), thrice(GREY)),
    "PNG, palette": (pillow(SIXTEEN_COLOURS, "PNG"), OF_16),
    "PNG, palette with transparency": (pillow(SIXTEEN_COLOURS, "PNG", transparency=3), OF_16),
    "PNG, LA": (pillow(GREY_ALPHA, "PNG"), thrice(GREY)),
    "PNG, RGBA": (pillow(with_alpha(RGB), "PNG"), RGB),
    "PNG, 1-bit": (pillow(BILEVEL, "PNG"), thrice(np.uint8(255) * BINARY)),
    "PNG, 16-bit grey": (pillow(DEEP[..., 0], "PNG"), thrice(DEEP[..., 0])),
    "PNG, 16-bit RGB": (deep_png(DEEP), DEEP),
    "PNG, 16-bit RGBA": (deep_png(with_alpha(DEEP)), DEEP),
    "BMP": (pillow(RGB, "BMP"), RGB),
    "TIFF, grey": (pillow(GREY, "TIFF"), thrice(GREY)),
    "TIFF, uncompressed": (pillow(RGB, "TIFF"), RGB),
    "TIFF, big-endian": (tiff(DEEP, byteorder=">", photometric="rgb"), DEEP),
    "TIFF, RGBA": (pillow(with_alpha(RGB), "TIFF"), RGB),
    "TIFF, LZW": (pillow(RGB, "TIFF", compression="tiff_lzw"), RGB),
    "TIFF, LZW with predictor": (tiff(RGB, compression="lzw", predictor=True), RGB),
    "TIFF, deflate": (pillow(RGB, "TIFF", compression="tiff_adobe_deflate"), RGB),
    "TIFF, tiled": (tiff(RGB, photometric="rgb", tile=(16, 32)), RGB),
    "TIFF, BigTIFF": (tiff(DEEP, photometric="rgb", bigtiff=True), DEEP),
    "TIFF, OME": (tiff(RGB, photometric="rgb", ome=True), RGB),
    "TIFF, ImageJ": (tiff(RGB, photometric="rgb", imagej=True), RGB),
    "TIFF, planar RGB": (tiff(PLANES, photometric="rgb", planarconfig="separate"), RGB),
    "TIFF, planes of three samples": (
        tiff(RGB, photometric="minisblack", planarconfig="contig"),
        RGB,
    ),
    "TIFF, alpha that is not declared": (
        tiff(with_alpha(RGB), photometric="rgb", extrasamples=["unspecified"]),
        RGB,
    ),
    "TIFF, grey with alpha": (
        tiff(
            with_alpha(GREY),
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=["unassalpha"],
        ),
        thrice(GREY),
    ),
    "TIFF, palette": (pillow(SIXTEEN_COLOURS, "TIFF"), OF_16),
    "TIFF, grey palette": (
        tiff(GREY, photometric="palette", colormap=np.stack([np.arange(65535, -1, -257)] * 3)),
        thrice(255 - GREY),
    ),
    "TIFF, 1-bit": (pillow(BILEVEL, "TIFF"), thrice(np.uint8(255) * BINARY)),
    "TIFF, fax": (pillow(BILEVEL, "TIFF", compression="group4"), thrice(np.uint8(255) * BINARY)),
    "TIFF, white is 0": (tiff(255 - GREY, photometric="miniswhite"), thrice(GREY)),
    "TIFF, 1-bit, white is 0": (
        tiff(~BINARY, photometric="miniswhite"),
        thrice(np.uint8(255) * BINARY),
    ),
    "TIFF, 16-bit, white is 0": (
        tiff(65535 - DEEP[..., 0], photometric="miniswhite"),
        thrice(DEEP[..., 0]),
    ),
    "TIFF, 16-bit grey": (tiff(DEEP[..., 0]), thrice(DEEP[..., 0])),
    "TIFF, 16-bit RGB": (tiff(DEEP, photometric="rgb"), DEEP),
    "TIFF, one plane of a stack": (tiff(GREY[None, None], ome=True), thrice(GREY)),
}


@pytest.mark.parametrize("form", LOSSLESS)
def test_fault_05_06_09_10_every_stored_form_reads_as_the_rgb_picture_it_shows(form: str) -> None:
    data, expected = LOSSLESS[form]
    image = read_image(data, form)
    assert image.dtype == expected.dtype
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        pytest.param(pillow(SMOOTH, "JPEG", quality=98, subsampling=0), 6, id="JPEG"),
        pytest.param(
            pillow(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=98, subsampling=0),
            6,
            id="CMYK JPEG",
        ),
        pytest.param(
            pillow(SMOOTH, "TIFF", compression="jpeg", quality=98), 12, id="JPEG in TIFF, YCbCr"
        ),
        pytest.param(
            tiff(SMOOTH, photometric="rgb", compression="jpeg", compressionargs={"level": 98}),
            6,
            id="JPEG in TIFF, RGB",
        ),
    ],
)
def test_lossy_forms_read_as_nearly_the_rgb_picture(data: bytes, tolerance: int) -> None:
    image = read_image(data, "picture")
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image.astype(int), SMOOTH.astype(int), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int32])
def test_other_number_types_keep_their_values_as_float32(dtype: type) -> None:
    values = (GREY.astype(np.float64) * 4 - 300).astype(dtype)
    image = read_image(tiff(values), "numbers.tif")
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, thrice(values))


FILM = RNG.integers(0, 256, (5, 3, 2, 40, 56), dtype=np.uint8)  # T, Z, C, Y, X
FILM_IN_COLOUR = RNG.integers(0, 256, (5, 3, 40, 56, 3), dtype=np.uint8)
IMAGEJ = {"imagej": True, "photometric": "minisblack"}
OME = {"ome": True, "photometric": "minisblack"}
PAGES = [Image.fromarray(page) for page in FILM[:, 0, 0]]

# Each file beside its planes by rows by columns by channels, and what the planes are.
STACKS = {
    "ImageJ, z stack": (tiff(FILM[0, :, 0], metadata={"axes": "ZYX"}, **IMAGEJ), "Z", (3,), 1),
    "ImageJ, hyperstack": (tiff(FILM, metadata={"axes": "TZCYX"}, **IMAGEJ), "TZ", (5, 3), 2),
    "ImageJ, film in colour": (
        tiff(FILM_IN_COLOUR, imagej=True, photometric="rgb", metadata={"axes": "TZYXS"}),
        "TZ",
        (5, 3),
        3,
    ),
    "OME, time series": (tiff(FILM[:, 0, 0], metadata={"axes": "TYX"}, **OME), "T", (5,), 1),
    "OME, channels first": (
        tiff(FILM.transpose(2, 0, 1, 3, 4), metadata={"axes": "CTZYX"}, **OME),
        "TZ",
        (5, 3),
        2,
    ),
    "OME, film in colour": (
        tiff(FILM_IN_COLOUR, ome=True, photometric="rgb", metadata={"axes": "TZYXS"}),
        "TZ",
        (5, 3),
        3,
    ),
    "OME, channels in colour": (
        tiff(FILM_IN_COLOUR[:, 0], ome=True, photometric="rgb", metadata={"axes": "CYXS"}),
        "C",
        (5,),
        3,
    ),
    "pages of Pillow": (
        pillow(PAGES[0], "TIFF", save_all=True, append_images=PAGES[1:], compression="tiff_lzw"),
        "I",
        (5,),
        1,
    ),
    "pages of tifffile": (tiff(FILM[:, :, 0], photometric="minisblack"), "QQ", (5, 3), 1),
    "pages in colour": (tiff(FILM_IN_COLOUR, photometric="rgb"), "QQ", (5, 3), 3),
}


@pytest.mark.parametrize("kind", STACKS)
def test_fault_07_a_stack_gives_every_plane_with_what_it_is(kind: str) -> None:
    data, axes, shape, channels = STACKS[kind]
    film = FILM_IN_COLOUR if channels == 3 else FILM[:, :, :channels].transpose(0, 1, 3, 4, 2)
    if "T" not in axes and shape[0] == 3:
        film = film[0]
    elif len(shape) == 1:
        film = film[:, 0]
    recording = read_recording(data, "stack")
    assert (recording.plane_axes, recording.plane_shape) == (axes, shape)
    assert recording.colour is (channels == 3)
    np.testing.assert_array_equal(recording.pixels.reshape(film.shape), film)


@pytest.mark.parametrize("kind", STACKS)
def test_a_cut_off_stack_is_refused_and_never_gives_its_first_planes(kind: str) -> None:
    data = STACKS[kind][0]
    for fraction in (0.3, 0.6, 0.9):
        with pytest.raises(InputError, match=r"^stack: "):
            read_recording(data[: int(len(data) * fraction)], "stack")


def test_a_stack_and_a_stack_of_masks_are_refused_for_training() -> None:
    data = STACKS["ImageJ, hyperstack"][0]
    for read in (read_image, read_labels):
        with pytest.raises(InputError, match=r"^film\.tif: a stack of 15 planes \(5 T x 3 Z\)"):
            read(data, "film.tif")


def test_one_plane_or_the_maximum_is_taken_from_a_stack() -> None:
    recording = read_recording(STACKS["ImageJ, hyperstack"][0], "film.tif")
    assert recording.planes == tuple(range(15))
    assert select_planes(recording, "all") is recording
    film = FILM.transpose(0, 1, 3, 4, 2)
    one = select_planes(recording, "7")
    assert (one.planes, one.plane_axes, one.plane_shape) == ((7,), "", ())
    np.testing.assert_array_equal(one.pixels, film[2, 1][None])
    np.testing.assert_array_equal(to_rgb_planes(one, "1")[0], thrice(film[2, 1, ..., 1])[None])
    # Time stays, whichever axis comes first.
    swapped = FILM.transpose(1, 0, 2, 3, 4)
    swapped_ome = tiff(swapped, ome=True, metadata={"axes": "ZTCYX"})
    for stack in (recording, read_recording(swapped_ome, "film.ome.tif")):
        flat = select_planes(stack, "max")
        assert (flat.planes, flat.plane_axes, flat.plane_shape) == (tuple(range(5)), "T", (5,))
        np.testing.assert_array_equal(flat.pixels, film.max(axis=1))
    depth = select_planes(read_recording(STACKS["ImageJ, z stack"][0], "a.tif"), "max")
    assert (depth.planes, depth.plane_axes, depth.plane_shape) == ((), "", ())


def test_a_single_plane_is_itself_its_first_plane_and_its_maximum() -> None:
    recording = read_recording(pillow(GREY, "PNG"), "cells.png")
    assert recording.planes == ()
    for plane in ("all", "max", "0"):
        assert select_planes(recording, plane) is recording


@pytest.mark.parametrize("plane", ["15", "-1", "first", "1.0", ""])
def test_a_plane_that_is_not_there_is_refused_with_those_that_are(plane: str) -> None:
    recording = read_recording(STACKS["ImageJ, hyperstack"][0], "film.tif")
    reason = rf"^film\.tif: no plane '{plane}'; --data\.plane can be 0 to 14, max or all$"
    with pytest.raises(InputError, match=reason):
        select_planes(recording, plane)


def test_the_maximum_passes_over_nan() -> None:
    planes = np.array([[[1, np.nan]], [[np.nan, 2]]], np.float32)
    recording = read_recording(tiff(planes, photometric="minisblack"), "holes")
    np.testing.assert_array_equal(select_planes(recording, "max").pixels[0, 0, :, 0], [1, 2])


CHANNELS = np.moveaxis(RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8), 2, 0)


def of_imagej(*labels: str) -> bytes:
    metadata = {"axes": "CYX", "Labels": list(labels)} if labels else {"axes": "CYX"}
    return tiff(CHANNELS[: len(labels) or 3], metadata=metadata, **IMAGEJ)


def of_ome(*names: str) -> bytes:
    metadata = {"axes": "CYX", "Channel": {"Name": list(names)}}
    return tiff(CHANNELS[: len(names)], metadata=metadata, **OME)


def of_bioformats(**attributes: list[str | int]) -> bytes:
    metadata = {"axes": "CYX", "Channel": attributes}
    return tiff(CHANNELS[: len(next(iter(attributes.values())))], metadata=metadata, **OME)


def of_tables(*colours: int, **more: list[str]) -> bytes:
    tables = np.zeros((len(colours), 3, 256), np.uint8)
    for table, colour in zip(tables, colours, strict=True):
        table[colour] = np.arange(256)
    metadata = {"axes": "CYX", "LUTs": list(tables), **more}
    # Like ImageJ, which stores the first table as a palette too.
    palette = tables[0].astype(np.uint16) * 257
    return tiff(CHANNELS[: len(colours)], imagej=True, colormap=palette, metadata=metadata)


@pytest.mark.parametrize(
    ("data", "channels", "taken"),
    [
        pytest.param(of_imagej(), ("0", "1", "2"), 0, id="ImageJ, no names"),
        pytest.param(of_imagej("GFP", "c:2 - Hoechst 33342"), None, 1, id="ImageJ, Hoechst"),
        pytest.param(of_tables(1, 2, 0), ("green", "blue", "red"), 1, id="ImageJ, look-up tables"),
        pytest.param(
            of_tables(1, 2, Labels=["c:1/2 z:1/9 - a.lif", "c:2/2 z:1/9 - a.lif"]),
            ("green", "blue"),
            1,
            id="Bio-Formats in Fiji",
        ),
        pytest.param(of_ome("EGFP", "TRITC", "DAPI"), ("EGFP", "TRITC", "DAPI"), 2, id="OME, DAPI"),
        pytest.param(of_bioformats(Fluor=["EGFP", "Hoechst"]), None, 1, id="OME, dyes"),
        pytest.param(
            of_bioformats(Color=[0x00FF00FF, 0x0000FFFF]), ("green", "blue"), 1, id="OME, colours"
        ),
        pytest.param(
            of_bioformats(Color=[-16776961, 2**32 - 1]), ("red", "1"), 0, id="OME, red and white"
        ),
        pytest.param(of_ome("cDNA probe", "w2H2B-mCherry"), None, 1, id="H2B"),
        pytest.param(of_ome("nucleolin", "488", "405"), None, 2, id="405"),
        pytest.param(of_ome("4050", "nucleoli", "Nuclei"), None, 2, id="nuclei"),
        pytest.param(of_ome("actin", "tubulin"), ("actin", "tubulin"), 0, id="OME, no nuclei"),
        pytest.param(
            tiff(CHANNELS, photometric="minisblack", metadata={"axes": "CYX"}),
            ("0", "1", "2"),
            0,
            id="tifffile",
        ),
        pytest.param(
            tiff(
                np.moveaxis(CHANNELS[[0, 1]], 0, 2), photometric="minisblack", planarconfig="contig"
            ),
            ("0", "1"),
            0,
            id="two samples",
        ),
    ],
)
def test_fault_08_of_several_channels_the_nuclear_one_is_taken(
    data: bytes, channels: tuple[str, ...] | None, taken: int
) -> None:
    recording = read_recording(data, "cells")
    assert not recording.colour
    if channels:  # else the file does not name them
        assert recording.channels == channels
    planes, note = to_rgb_planes(recording)
    np.testing.assert_array_equal(planes[0], thrice(CHANNELS[taken]))
    np.testing.assert_array_equal(read_image(data, "cells"), thrice(CHANNELS[taken]))
    if any(word in str(recording.channels) for word in ("DAPI", "H2B", "405'", "Nuc", "Hoechst")):
        assert note == ""
    else:
        assert "without a nuclear name" in note
        assert f"took {recording.channels[taken]}; --data.channel" in note


def test_labels_of_planes_name_the_channels_of_a_hyperstack() -> None:
    labels = [f"{name} {plane}" for plane in range(15) for name in ("GFP", "DAPI")]
    data = tiff(FILM, metadata={"axes": "TZCYX", "Labels": labels}, **IMAGEJ)
    assert read_recording(data, "film.tif").channels == ("GFP 0", "DAPI 0")


@pytest.mark.parametrize(
    "form", ["PNG, LA", "TIFF, grey with alpha", "TIFF, grey palette", "PNG, RGBA", "TIFF, RGBA"]
)
def test_transparency_and_greys_of_a_palette_are_no_channels(form: str) -> None:
    recording = read_recording(LOSSLESS[form][0], form)
    assert recording.channels == (recordings.COLOURS if "RGBA" in form else ("0",))
    assert to_rgb_planes(recording)[1] == ""


@pytest.mark.parametrize(("channel", "number"), [("egfp", 0), ("DAPI", 2), ("1", 1), ("2", 2)])
def test_a_channel_is_taken_by_name_or_number(channel: str, number: int) -> None:
    data = of_ome("EGFP", "TRITC", "DAPI")
    planes, note = to_rgb_planes(read_recording(data, "cells"), channel)
    np.testing.assert_array_equal(planes[0], thrice(CHANNELS[number]))
    assert note == ""
    np.testing.assert_array_equal(read_image(data, "cells", channel), planes[0])


@pytest.mark.parametrize(("channel", "number"), [("Blue", 2), ("red", 0), ("1", 1)])
def test_a_channel_is_taken_from_a_colour_image(channel: str, number: int) -> None:
    for data in (pillow(with_alpha(RGB), "PNG"), tiff(RGB, photometric="rgb")):
        np.testing.assert_array_equal(read_image(data, "stain", channel), thrice(RGB[..., number]))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    ("tint", "taken", "several"),
    [
        pytest.param((0, 0, 1), 2, False, id="blue"),
        pytest.param((1, 0, 0), 0, False, id="red"),
        pytest.param((0.4, 1, 0), 1, True, id="lime"),
        pytest.param((1, 1, 0.5), 2, True, id="dim blue"),
        pytest.param((1, 0.9, 0.05), 0, True, id="hardly blue"),
    ],
)
def test_fault_08_of_colours_on_black_one_is_taken(
    tint: tuple[float, ...], taken: int, several: bool, dtype: type
) -> None:
    scene = np.zeros((40, 56, 3))
    scene[10:30, 10:30] = tint
    scene = (scene * 200).astype(dtype)
    recording = read_recording(tiff(scene, photometric="rgb"), "merge")
    planes, note = to_rgb_planes(recording)
    np.testing.assert_array_equal(planes[0], thrice(scene[..., taken]))
    colour = recordings.COLOURS[taken]
    expected = f"several colours on black, took {colour}; --data.channel picks another"
    assert note == (expected if several else "")


@pytest.mark.parametrize(
    ("ground", "nuclei"),
    [
        pytest.param((240, 240, 240), (90, 50, 130), id="stained tissue"),
        pytest.param((180, 120, 160), (90, 50, 130), id="stained all over"),
        pytest.param((0, 0, 0), (200, 200, 200), id="grey"),
        pytest.param((0, 0, 0), (200, 195, 190), id="nearly grey"),
        pytest.param((0, 0, 0), (0, 0, 0), id="black"),
    ],
)
def test_colours_of_tissue_and_greys_stay(ground: tuple[int, ...], nuclei: tuple[int, ...]) -> None:
    scene = np.zeros((40, 56, 3), np.uint8) + np.array(ground, np.uint8)
    scene[10:30, 10:30] = nuclei
    planes, note = to_rgb_planes(read_recording(pillow(scene, "PNG"), "scene"))
    np.testing.assert_array_equal(planes[0], scene)
    assert note == ""


def test_a_name_that_is_a_number_comes_before_the_number() -> None:
    data = of_ome("1", "0")
    np.testing.assert_array_equal(read_image(data, "cells", "1"), thrice(CHANNELS[0]))


@pytest.mark.parametrize("channel", ["Cy5", "3", "-1", ""])
def test_fault_08_a_channel_that_is_not_there_is_refused_with_those_that_are(channel: str) -> None:
    reason = rf"^cells: no channel '{channel}'; --data\.channel can be 0 \(EGFP\), 1 \(DAPI\)$"
    with pytest.raises(InputError, match=reason):
        read_image(of_ome("EGFP", "DAPI"), "cells", channel)
    with pytest.raises(InputError, match=r"can be 0$"):
        read_image(pillow(GREY, "PNG"), "grey", "Cy5")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": r"\u00B5m"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micrometers"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "micrometre"}}, 0.25),
        ({"imagej": True, "resolution": (0.004, 0.004), "metadata": {"unit": "nm"}}, 0.25),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ({"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}}, None),
        ({"imagej": True}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5}}, 0.5),
        (
            {"ome": True, "metadata": {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm"}},
            0.5,
        ),
        ({"ome": True, "metadata": {"PhysicalSizeX": 1, "PhysicalSizeXUnit": "pixel"}}, None),
        ({"ome": True}, None),
        (
            {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um", "spacing": "abc"}},
            0.25,
        ),
        # Of pixels that are no squares, a length would be wrong in one direction.
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.6}}, None),
        (
            {
                "ome": True,
                "resolution": (20000, 20000),
                "resolutionunit": "CENTIMETER",
                "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.6},
            },
            None,
        ),
        ({"imagej": True, "resolution": (4, 2), "metadata": {"unit": "um"}}, None),
        ({"resolution": (20000, 10000), "resolutionunit": "centimeter"}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "centimeter"}, 0.5),
        ({"resolution": (25400, 25400), "resolutionunit": "inch"}, 1.0),
        ({"resolution": (20000, 20000), "resolutionunit": "none"}, None),
        ({"resolution": (72, 72), "resolutionunit": "inch"}, None),
        ({"resolution": (300, 300), "resolutionunit": "inch"}, None),
        ({}, None),
    ],
)
def test_the_size_of_a_pixel_is_read_and_that_of_a_screen_is_not(
    options: dict[str, Any], expected: float | None
) -> None:
    size = read_recording(tiff(GREY, **options), "cells").pixel_size
    assert size == (expected and pytest.approx(expected))


def test_several_series_are_refused() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY)
        writer.write(GREY[:20, :28])  # half as large, as a level of a pyramid
    with pytest.raises(InputError, match=r"^plate/well\.tif: holds 2 images"):
        read_image(file.getvalue(), "plate/well.tif")


def test_fault_07_pages_that_were_added_one_by_one_are_a_stack() -> None:
    pages = np.stack([GREY, GREY[::-1], 255 - GREY])
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack")
    recording = read_recording(file.getvalue(), "a.tif")
    np.testing.assert_array_equal(recording.pixels[..., 0], pages)
    assert (recording.plane_shape, recording.planes) == ((3,), (0, 1, 2))


@pytest.mark.parametrize("file_format", ["OME", "plain"])
def test_smaller_copies_of_an_image_are_left_aside(file_format: str) -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, ome=file_format == "OME") as writer:
        if file_format == "OME":
            writer.write(GREY, subifds=1)
            writer.write(GREY[::2, ::2], subfiletype=1)
        else:  # a thumbnail that is no level of a pyramid
            writer.write(GREY, metadata=None)
            writer.write(GREY[:13, :13], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(file.getvalue(), "slide"), thrice(GREY))


def test_ome_files_that_belong_together_are_read_each_for_itself(tmp_path: Path) -> None:
    # As Bio-Formats writes them: both describe both, and a path leads from one to the other.
    form = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{0}">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
        'SizeX="56" SizeY="40" SizeZ="1" SizeC="2" SizeT="1" PhysicalSizeX="0.25">'
        '<Channel ID="Channel:0:0" Name="GFP"/><Channel ID="Channel:0:1" Name="DAPI"/>'
        '<TiffData IFD="0" FirstC="0"><UUID FileName="0.tif">urn:uuid:0</UUID></TiffData>'
        '<TiffData IFD="0" FirstC="1"><UUID FileName="1.tif">urn:uuid:1</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    pages = (GREY, 255 - GREY)
    for number, page in enumerate(pages):
        description = form.format(number)
        tifffile.imwrite(tmp_path / f"{number}.tif", page, description=description, metadata=None)
    for number, (page, channel) in enumerate(zip(pages, ("GFP", "DAPI"), strict=True)):
        recording = read_recording(tmp_path / f"{number}.tif")
        np.testing.assert_array_equal(recording.pixels, page[None, ..., None])
        assert (recording.channels, recording.pixel_size) == ((channel,), 0.25)


@pytest.mark.parametrize("name", ["1.ome.tif", "renamed.tif"])
def test_an_ome_file_of_one_time_has_the_channels_of_that_time(name: str, tmp_path: Path) -> None:
    planes = "".join(
        f'<TiffData FirstT="{time}" FirstC="{channel}" FirstZ="{z}" IFD="{2 * channel + z}">'
        f'<UUID FileName="{time}.ome.tif">urn:uuid:{time}</UUID></TiffData>'
        for time in range(3)
        for channel in range(2)
        for z in range(2)
    )
    description = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" '
        'SizeX="56" SizeY="40" SizeZ="2" SizeC="2" SizeT="3">'
        '<Channel ID="Channel:0:0" Name="GFP"/><Channel ID="Channel:0:1" Name="DAPI"/>'
        f"{planes}</Pixels></Image></OME>"
    )
    pages = np.stack([GREY, GREY // 2, 255 - GREY, GREY // 3])
    tifffile.imwrite(
        tmp_path / name, pages, photometric="minisblack", description=description, metadata=None
    )
    recording = read_recording(tmp_path / name)
    assert (recording.channels, recording.plane_axes) == (("GFP", "DAPI"), "Z")
    expected = pages.reshape(2, 2, *GREY.shape).transpose(1, 2, 3, 0)
    np.testing.assert_array_equal(recording.pixels, expected)


def test_an_animation_is_refused() -> None:
    frames = [Image.fromarray(255 - GREY)]
    data = pillow(GREY, "PNG", save_all=True, append_images=frames)
    with pytest.raises(InputError, match=r"^film\.png: holds 2 frames"):
        read_image(data, "film.png")


SOUND = {
    "grey.png": pillow(GREY, "PNG"),
    "deep.png": deep_png(DEEP),
    "rgb.jpg": pillow(RGB, "JPEG"),
    "plain.tif": pillow(GREY, "TIFF"),
    "lzw.tif": tiff(RGB, compression="lzw"),
    "deflate.tif": tiff(RGB, compression="zlib", rowsperstrip=8),
    "tiled.tif": tiff(GREY, tile=(16, 16)),
    "jpeg strips.tif": tiff(RGB, compression="jpeg", photometric="rgb", rowsperstrip=16),
}


@pytest.mark.parametrize("fraction", [0.003, 0.2, 0.6, 0.98])
@pytest.mark.parametrize("name", SOUND)
def test_fault_02_a_truncated_file_is_refused_by_name(
    tmp_path: Path, name: str, fraction: float
) -> None:
    data = SOUND[name]
    path = tmp_path / name
    path.write_bytes(data)
    assert read_image(path).shape == (40, 56, 3)
    path.write_bytes(data[: max(1, int(len(data) * fraction))])
    assert_refused_by_name(path)


@pytest.mark.parametrize(
    "content", [b"", b"Dear colleague,\nplease find attached\n", b"II*\0junk", b"\x89PNG\r\n\x1a\n"]
)
@pytest.mark.parametrize("name", ["fake.png", "fake.tif"])
def test_fault_02_an_empty_or_fake_file_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert_refused_by_name(path)


def assert_refused_by_name(path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    with pytest.raises(InputError, match=r"^short name: "):
        read_image(path, "short name")


def test_complex_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"^wave\.tif: pixels of type complex64"):
        read_image(tiff(GREY.astype(np.complex64)), "wave.tif")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", True),
        ("deep/er/A.TIF", True),
        ("a.ome.tiff", True),
        ("a.JPeG", True),
        ("Thumbs.db", False),
        ("a.png.txt", False),
        (".DS_Store", False),
        ("deep/._a.tif", False),
        ("png", False),
    ],
)
def test_images_are_known_by_suffix_and_hidden_files_are_none(name: str, expected: bool) -> None:
    assert is_image(name) is expected


ND2 = b"\xda\xce\xbe\x0a" + bytes(100)
CZI = b"ZISRAWFILE" + bytes(100)


@pytest.mark.parametrize(("suffix", "data"), [("nd2", ND2), ("czi", CZI)])
def test_a_vendor_format_without_its_library_is_refused_with_its_name(
    suffix: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nd2", None)
    monkeypatch.setitem(sys.modules, "czifile", None)
    way_out = rf"^cells\.{suffix}: reading \.{suffix} needs .* pip install '?{suffix}"
    with pytest.raises(InputError, match=way_out):
        read_recording(data, f"cells.{suffix}")


def stand_in(monkeypatch: pytest.MonkeyPatch, library: str, reader: str, **content: Any) -> None:
    """A library whose reader gives this content of any file."""

    class Reader(SimpleNamespace):
        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def opened(_: Any) -> Reader:
        return Reader(**content)

    module: Any = ModuleType(library)
    setattr(module, reader, opened)
    module.czifile = SimpleNamespace(DECOMPRESS={0: None})
    monkeypatch.setitem(sys.modules, library, module)


@pytest.mark.parametrize("calibrated", [True, False])
def test_an_nd2_file_is_taken_apart_into_planes_and_channels(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = SimpleNamespace(axesCalibrated=[calibrated] * 3, axesCalibration=(0.25, 0.25, 2.0))
    channels = [
        SimpleNamespace(channel=SimpleNamespace(name=name), volume=volume)
        for name in ("GFP", "DAPI")
    ]
    stand_in(
        monkeypatch,
        *("nd2", "ND2File"),
        sizes={"T": 5, "P": 3, "C": 2, "Y": 40, "X": 56},
        dtype=FILM.dtype,
        asarray=lambda: FILM,
        metadata=SimpleNamespace(channels=channels),
    )
    recording = read_recording(ND2, "cells.nd2")
    assert (recording.plane_axes, recording.plane_shape) == ("TP", (5, 3))
    assert (recording.channels, recording.colour) == (("GFP", "DAPI"), False)
    assert recording.pixel_size == (0.25 if calibrated else None)
    assert recording.z_step == (2 if calibrated else None)
    planes, _ = to_rgb_planes(recording)
    np.testing.assert_array_equal(planes[7], thrice(FILM[2, 1, 1]))


CZI_METADATA = """<ImageDocument><Metadata><Information><Image><Dimensions><Channels>
<Channel Name="GFP"/><Channel Name="DAPI"/></Channels></Dimensions></Image></Information>
<Scaling><Items><Distance Id="X"><Value>2.5e-07</Value></Distance>
<Distance Id="Z"><Value>2e-06</Value></Distance></Items></Scaling>
</Metadata></ImageDocument>"""


def czi_of(pixels: np.ndarray, axes: str, compression: int = 0) -> dict[str, Any]:
    block = SimpleNamespace(compression=compression, shape=pixels.shape, stored_shape=pixels.shape)
    return {
        "axes": axes,
        "shape": pixels.shape,
        "dtype": pixels.dtype,
        "filtered_subblock_directory": [block],
        "asarray": lambda out, max_workers: np.copyto(out, pixels),
        "metadata": lambda: CZI_METADATA,
    }


def test_a_czi_file_is_taken_apart_into_planes_and_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pixels = FILM.transpose(2, 0, 1, 3, 4)[None, ..., None]
    stand_in(monkeypatch, "czifile", "CziFile", **czi_of(pixels, "SCTZYX0"))
    recording = read_recording(CZI, "cells.czi")
    assert (recording.plane_axes, recording.plane_shape) == ("TZ", (5, 3))
    assert (recording.channels, recording.colour) == (("GFP", "DAPI"), False)
    assert recording.pixel_size == pytest.approx(0.25)
    assert recording.z_step == pytest.approx(2)
    planes, _ = to_rgb_planes(recording)
    np.testing.assert_array_equal(planes[7], thrice(FILM[2, 1, 1]))


def test_a_czi_file_in_colour_reads_as_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "czifile", "CziFile", **czi_of(RGB[None, None], "SCYX0"))
    assert read_recording(CZI, "stain.czi").colour
    np.testing.assert_array_equal(read_image(CZI, "stain.czi"), RGB)


def test_a_czi_file_of_several_scenes_or_unknown_compression_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for czi, reason in (
        (czi_of(FILM[:, 0, 0, ..., None], "SYX0"), "holds 5 scenes"),
        (czi_of(GREY[..., None], "YX0", compression=6), "compressed .*; save it as TIFF"),
    ):
        stand_in(monkeypatch, "czifile", "CziFile", **czi)
        with pytest.raises(InputError, match=rf"^cells\.czi: {reason}"):
            read_recording(CZI, "cells.czi")


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (17, 33), (100, 160)])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "OME", "ImageJ"])
def test_fault_11_the_shape_is_kept(shape: tuple[int, int], file_format: str) -> None:
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    if file_format == "PNG":
        data = pillow(pixels, "PNG")
    else:
        data = tiff(pixels, ome=file_format == "OME", imagej=file_format == "ImageJ")
    np.testing.assert_array_equal(read_image(data, "crop"), thrice(pixels))


def png_header(width: int, height: int, depth: int, colour: int) -> bytes:
    """A sound PNG of that size, but with hardly any pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def tiff_header(width: int, height: int) -> bytes:
    """A sound TIFF of one blank tile, whose size is then changed."""
    data = tiff(np.zeros((16, 16), np.uint8), tile=(16, 16), compression="zlib", metadata=None)
    with tifffile.TiffFile(io.BytesIO(data)) as tags:
        fields = {tag.name: tag.valueoffset for tag in tags.pages.first.tags}
    changed = bytearray(data)
    for field, value in (("ImageWidth", width), ("ImageLength", height)):
        struct.pack_into("<H", changed, fields[field], value)
    return bytes(changed)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png_header(30_000, 30_000, 8, 0), id="PNG, above Pillow's own limit"),
        pytest.param(png_header(8_000, 8_000, 16, 2), id="PNG, 16-bit colour"),
        pytest.param(tiff_header(60_000, 60_000), id="TIFF"),
    ],
)
def test_fault_31_what_claims_a_thousand_times_its_size_is_refused_undecoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("imagecodecs.png_decode", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    monkeypatch.setattr("tifffile.TiffPageSeries.asarray", decode)
    with pytest.raises(InputError, match=r"^bomb: its header claims .* MiB, over 1,000 times"):
        read_recording(data, "bomb")


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_fault_31_what_does_not_fit_the_memory_is_refused(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pillow(GREY, file_format)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # set by the reader

    monkeypatch.setattr(recordings, "memory_limit", lambda: GREY.size)
    assert read_recording(data, "slide").pixels.size == GREY.size
    monkeypatch.setattr(recordings, "memory_limit", lambda: GREY.size - 1)
    with pytest.raises(InputError, match=r"^slide: .*memory.* tiled TIFF.*, or cut it up$"):
        read_recording(data, "slide")


def test_fault_31_a_large_blank_image_is_read_without_a_warning() -> None:
    # Between the limit at which Pillow warns, 89 million pixels, and ours.
    blank = np.zeros((9_600, 9_600), np.uint8)
    assert read_image(pillow(blank, "PNG", compress_level=1), "blank").shape == (9_600, 9_600, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_limits_are_percentiles_of_all_channels_together(dtype: type) -> None:
    # 201 values a step apart: percentile p is the value 2 p.
    values = np.arange(201).reshape(67, 1, 3).astype(dtype)
    np.testing.assert_allclose(intensity_limits(values, (1.0, 99.75))[:2], (2, 199.5))
    np.testing.assert_allclose(intensity_limits(values, (0.0, 100.0))[:2], (0, 200))


@pytest.mark.parametrize(
    ("least", "most", "low"),
    [
        (250, 255, 0.9 * 255),  # as of empty glass
        (130, 149, 130),  # a range that is wide enough
        (100, 105, 100),  # no bright background
    ],
)
def test_an_8_bit_image_on_a_bright_background_is_stretched_so_far_only(
    least: int, most: int, low: float
) -> None:
    ramp = np.roll(np.linspace(least, most, 400).round().astype(np.uint8), 200)
    values = np.broadcast_to(ramp[:, None, None], (400, 40, 1))
    assert intensity_limits(values, (0, 100))[:2] == (pytest.approx(low), most)
    for dtype in (np.uint16, np.float32):  # whose full range is not known
        assert intensity_limits(values.astype(dtype), (0, 100))[:2] == (least, most)


def nuclei_on_noise() -> np.ndarray:
    """(96, 128, 3) of 16 bits: blurred discs on a camera's offset."""
    rows, columns = np.mgrid[:96, :128]
    scene = 300 + RNG.normal(0, 5, (96, 128))
    for row, column in ((20, 20), (60, 40), (40, 90), (80, 110)):
        scene += 900 / (1 + np.exp(np.hypot(rows - row, columns - column) - 8))
    return thrice(scene.astype(np.uint16))


@pytest.mark.parametrize("value", [0, 65535])
@pytest.mark.parametrize(
    "widths", [((0, 0), (0, 7)), ((1, 1), (1, 1)), ((30, 0), (0, 50)), ((3, 4), (5, 6))]
)
def test_padding_does_not_count(widths: tuple[tuple[int, int], ...], value: int) -> None:
    scene = nuclei_on_noise()
    padded = np.pad(scene, (*widths, (0, 0)), constant_values=value)
    expected = np.percentile(scene, (1.0, 99.8))
    np.testing.assert_array_equal(intensity_limits(padded, (1.0, 99.8))[:2], expected)
    stack = np.stack([padded, padded])
    np.testing.assert_array_equal(intensity_limits(stack, (1.0, 99.8))[:2], expected)


def test_padding_with_what_no_camera_gives_does_not_count() -> None:
    scene = nuclei_on_noise().astype(np.float32)
    padded = np.pad(scene, ((0, 0), (20, 0), (0, 0)), constant_values=-9999)
    expected = np.percentile(scene, (1.0, 99.8))
    np.testing.assert_allclose(intensity_limits(padded, (1.0, 99.8))[:2], expected)


def turned(scene: np.ndarray, angle: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene (H, W, 3) turned on a larger canvas, and the place (H, W) of it."""
    planes = [scene[..., 0].astype(np.int32), np.ones(scene.shape[:2], np.int32)]
    shown, inside = (
        np.asarray(Image.fromarray(plane).rotate(angle, expand=True, fillcolor=fill))
        for plane, fill in zip(planes, (value, 0), strict=True)
    )
    return thrice(shown.astype(scene.dtype)), inside > 0


@pytest.mark.parametrize("value", [0, 65535])
@pytest.mark.parametrize("angle", [5, 30])
def test_the_corners_of_a_turned_image_do_not_count(angle: int, value: int) -> None:
    padded, inside = turned(nuclei_on_noise(), angle, value)
    limits = intensity_limits(padded, (1.0, 99.8))
    np.testing.assert_array_equal(limits[:2], np.percentile(padded[inside], (1.0, 99.8)))
    result = normalise(padded, limits)
    assert (result[~inside] == np.median(result[inside])).all()
    as_it_was = normalise(padded, Limits(*limits[:2]))
    np.testing.assert_array_equal(result[inside], as_it_was[inside])


def test_a_missing_tile_of_a_mosaic_and_what_surrounds_a_round_field_do_not_count() -> None:
    scene = nuclei_on_noise()
    rows, columns = np.mgrid[:96, :128]
    field = np.hypot((rows - 48) / 48, (columns - 64) / 64) < 0.98
    for inside in ((rows < 60) | (columns < 70), field):
        for value in (0, 65535):
            padded = np.where(inside[..., None], scene, value).astype(np.uint16)
            limits = intensity_limits(padded, (1.0, 99.8))
            np.testing.assert_array_equal(limits[:2], np.percentile(scene[inside], (1.0, 99.8)))


def test_a_scale_bar_is_found_beside_padding_of_its_value() -> None:
    scene = nuclei_on_noise()
    scene[88:92, 90:125] = 65535
    padded = np.pad(scene, ((0, 0), (60, 0), (0, 0)), constant_values=65535)
    limits = intensity_limits(padded, (1.0, 99.8))
    assert limits.high < 2000
    assert (normalise(padded, limits)[88:92, 150:185] < 0.5).all()


def test_what_someone_set_to_0_between_nuclei_is_no_padding() -> None:
    scene = nuclei_on_noise()
    scene[scene < 500] = 0
    limits = intensity_limits(scene, (1.0, 99.8))
    assert limits.padding is None and limits.low == 0


def test_rows_of_a_background_that_is_0_do_not_count() -> None:
    scene = np.where(nuclei_on_noise() > 350, nuclei_on_noise(), 0)
    scene[::95, ::127] = 400  # so that its own borders vary
    padded = np.pad(scene, ((0, 200), (0, 0), (0, 0)))
    expected = np.percentile(scene, (1.0, 99.8))
    np.testing.assert_array_equal(intensity_limits(padded, (1.0, 99.8))[:2], expected)


def test_what_surrounds_a_nucleus_that_was_cut_out_is_no_padding() -> None:
    rows, columns = np.mgrid[:80, :80]
    nucleus = np.hypot(rows - 40, columns - 40) < 34
    scene = thrice(np.where(nucleus, RNG.normal(140, 20, (80, 80)), 0).astype(np.uint8))
    limits = intensity_limits(scene, (1.0, 99.8))
    assert limits.padding is None and limits.low == 0


def test_padding_is_known_in_a_part_of_its_image() -> None:
    padded, inside = turned(nuclei_on_noise(), 30, 0)
    limits = intensity_limits(padded, (1.0, 99.8))
    whole = normalise(padded, limits)
    for part in (np.s_[:20, :30], np.s_[40:90, 100:150]):
        assert (~inside[part]).any()
        np.testing.assert_array_equal(normalise(padded[part], limits), whole[part])


def test_a_background_of_0_is_no_padding() -> None:
    scene = np.zeros((80, 80, 3), np.uint8)
    scene[30:60, 20:60] = RNG.integers(80, 200, (30, 40, 1))
    scene[50:60, 20:40] = 0
    low, high, *_ = intensity_limits(scene, (1.0, 99.8))
    assert low == 0 and high > 190


def test_hot_pixels_on_black_are_not_all_there_is() -> None:
    scene = np.zeros((80, 80, 3), np.uint8)
    scene[30, 20] = scene[35, 22] = 255
    np.testing.assert_array_equal(intensity_limits(scene, (1.0, 99.8))[:2], (0, 0))


@pytest.mark.parametrize("across", [False, True])
def test_a_scale_bar_and_the_text_beside_it_do_not_count(across: bool) -> None:
    scene = nuclei_on_noise()
    marked = scene.copy()
    marked[88:92, 90:125] = 65535
    marked[80:86, 100:104] = marked[82, 100:112] = 65535  # text
    if across:
        scene, marked = scene.swapaxes(0, 1), marked.swapaxes(0, 1)
    expected = np.percentile(scene, (1.0, 99.8))
    assert np.percentile(marked, 99.8) == 65535
    limits = intensity_limits(marked, (1.0, 99.8))
    np.testing.assert_allclose(limits[:2], expected, rtol=0.02)
    drawn = (marked != scene).any(axis=2)
    with_it, without = normalise(marked, limits), normalise(scene, limits)
    np.testing.assert_allclose(with_it[drawn], np.median(without), atol=0.01)
    apart = distance_transform_edt(~drawn) > 3
    np.testing.assert_array_equal(with_it[apart], without[apart])


def test_nuclei_as_bright_as_a_scale_bar_stay() -> None:
    scene = nuclei_on_noise()
    rows, columns = np.mgrid[:96, :128]
    nuclei = [np.hypot(rows - row, columns - column) for row, column in ((30, 60), (60, 75))]
    for distance in nuclei:
        scene[distance < 8] = 65535  # more of them would count as the image's own range
    scene[88:91, 90:125] = 65535
    result = normalise(scene, intensity_limits(scene, (1.0, 99.8)))
    assert (result[88:91, 90:125] < 0.5).all()
    assert all((result[distance < 8] == 1).all() for distance in nuclei)


def test_flat_bright_nuclei_are_no_scale_bar() -> None:
    scene = nuclei_on_noise()
    rows, columns = np.mgrid[:96, :128]
    scene[np.hypot(rows - 50, columns - 64) < 8] = 65535  # saturated
    scene[10:22, 100:110] = 65535
    assert intensity_limits(scene, (1.0, 99.8))[1] == 65535


def test_stained_tissue_with_a_white_scale_bar_keeps_its_colours() -> None:
    tissue = np.full((120, 160, 3), (140, 120, 140), np.uint8)
    tissue[30:60, 30:70] = (70, 40, 90)
    tissue = (tissue + RNG.integers(0, 8, tissue.shape)).astype(np.uint8)
    tissue[110:114, 100:150] = 255
    assert colours_of(tissue) == (slice(None), "")


def test_a_drawing_of_bars_is_no_scale_bar() -> None:
    scene = np.zeros((96, 128, 3), np.uint8)
    scene[20:25, 30:60] = scene[50:54, 70:95] = 255
    np.testing.assert_array_equal(
        normalise(scene, intensity_limits(scene, (1.0, 99.8))), scene / 255
    )


def test_intensities_between_the_limits_become_0_to_1() -> None:
    image = np.array([0, 50, 60, 75, 150, 200], np.uint8).reshape(1, 2, 3)
    result = normalise(image, Limits(50.0, 150.0))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.ravel(), [0, 0, 0.1, 0.25, 1, 1], rtol=1e-6)


def test_a_stain_keeps_its_colour() -> None:
    red = RNG.integers(0, 200, (30, 30))
    image = np.stack([red, red // 2, np.zeros_like(red)], axis=2).astype(np.uint8)
    result = normalise(image, intensity_limits(image, (0.0, 100.0)))
    np.testing.assert_allclose(result[..., 1], result[..., 0] / 2, atol=0.01)
    assert result[..., 2].max() == 0


AS_STORED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "16-bit": lambda scene: scene.astype(np.uint16) * 257,
    "12 bits in 16": lambda scene: scene.astype(np.uint16) * 16,
    "float in 0 to 1": lambda scene: (scene / 255).astype(np.float32),
    "float in -1 to 1": lambda scene: (scene / 127.5 - 1).astype(np.float32),
    "tiny float": lambda scene: (scene * 1e-12).astype(np.float32),
    "huge float": lambda scene: (scene * 1e12).astype(np.float32),
}


@pytest.mark.parametrize("form", AS_STORED)
def test_fault_04_a_scene_normalises_the_same_whatever_range_it_is_stored_in(form: str) -> None:
    scene = (60 + 300 * gaussian_filter(RNG.normal(0, 1, (64, 64, 3)), (4, 4, 0))).astype(np.uint8)
    stored = AS_STORED[form](scene)
    percentiles = (1.0, 99.8)
    expected = normalise(scene, intensity_limits(scene, percentiles))
    result = normalise(stored, intensity_limits(stored, percentiles))
    assert expected.std() > 0.1
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-2)


def test_the_noise_of_rows_and_of_columns_counts_alike() -> None:
    rows = np.repeat(RNG.normal(400, 20, (300, 1, 1)), 300, 1)
    for image in (rows, rows.swapaxes(0, 1)):
        assert noise_of(image) == pytest.approx(20, rel=0.2)


NOISES: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "normal": lambda shape: RNG.normal(400, 20, shape).astype(np.uint16),
    "Poisson": lambda shape: RNG.poisson(9, shape).astype(np.uint16),
    "fractions": lambda shape: RNG.normal(0.5, 1e-3, shape).astype(np.float32),
    "padded": lambda shape: np.pad(RNG.normal(400, 20, shape), ((0, 300), (0, 0), (0, 0))),
}


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("side", [200, 2200])  # the larger one is sampled
def test_an_image_of_nothing_but_noise_stays_dim(kind: str, side: int) -> None:
    image = NOISES[kind]((side, side, 1))
    field = image[:side].astype(float)
    low, high, *_ = intensity_limits(image, (1.0, 99.8))
    assert high - low == pytest.approx(12 * field.std(), rel=0.05)
    assert low == pytest.approx(np.percentile(field, 1), rel=0.01)


def test_a_stack_of_nothing_but_noise_below_padding_stays_dim() -> None:
    stack = np.zeros((60, 208, 256, 1), np.uint16)
    stack[:, 8:] = RNG.normal(1000, 20, (60, 200, 256, 1))
    low, high, *_ = intensity_limits(stack, (1.0, 99.8))
    assert high - low == pytest.approx(12 * 20, rel=0.05)


def test_noise_is_known_beside_nuclei() -> None:
    scene = np.zeros((400, 400, 3))
    for row, column in RNG.integers(10, 390, (150, 2)):
        cv2.circle(scene, (int(column), int(row)), 10, (100, 100, 100), -1)
    for level in (0.5, 2, 8):
        image = (scene + RNG.normal(0, level, scene.shape)).astype(np.float32)
        assert noise_of(image) == pytest.approx(level, rel=0.2)
        limits = intensity_limits(image, (1.0, 99.8))
        np.testing.assert_allclose(limits[:2], np.percentile(image, (1.0, 99.8)), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("level", [0, 200])
def test_a_hot_pixel_does_not_raise_the_rest(dtype: type, level: int) -> None:
    image = np.full((40, 40, 3), level, dtype)
    image[3, 4] = 255
    result = normalise(image, intensity_limits(image, (1.0, 99.8)))
    hot = np.zeros((40, 40), bool)
    hot[3, 4] = True
    assert np.isfinite(result).all()
    assert (result[~hot] == 0).all()
    assert (result[hot] <= 1).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("level", [0, 1, 255])
def test_fault_13_a_constant_image_becomes_black(dtype: type, level: int) -> None:
    image = np.full((1, 5, 3), level, dtype)
    result = normalise(image, intensity_limits(image, (1.0, 99.8)))
    assert (result == 0).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_noise_of_one_part_in_ten_thousand_is_not_stretched_to_full_contrast(dtype: type) -> None:
    image = (20000 + RNG.integers(0, 3, (40, 40, 3))).astype(dtype)
    result = normalise(image, intensity_limits(image, (1.0, 99.8)))
    assert 0 < np.ptp(result) < 0.15


def test_less_than_a_grey_level_is_not_stretched_to_full_contrast() -> None:
    image = np.full((1, 2, 3), 100, np.uint8)
    np.testing.assert_allclose(normalise(image, Limits(99.7, 100.0)), 0.3, atol=1e-5)


def test_fault_14_limits_ignore_nan_and_infinite_pixels() -> None:
    image = gaussian_filter(RNG.normal(5, 2, (30, 30, 3)), (4, 4, 0)).astype(np.float32)
    holes = RNG.random(image.shape) < 0.1
    finite = image[~holes]
    image[holes] = RNG.choice([np.nan, np.inf, -np.inf], holes.sum())
    limits = intensity_limits(image, (1.0, 99.8))
    np.testing.assert_allclose(limits[:2], np.percentile(finite, (1.0, 99.8)), rtol=1e-6)
    result = normalise(image, limits)
    np.testing.assert_array_equal(result[np.isnan(image) | np.isneginf(image)], 0)
    np.testing.assert_array_equal(result[np.isposinf(image)], 1)
    expected = np.clip((finite - limits[0]) / (limits[1] - limits[0]), 0, 1)
    np.testing.assert_allclose(result[~holes], expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_fault_14_an_image_without_a_finite_pixel_stays_finite(value: float) -> None:
    image = np.full((4, 4, 3), value, np.float32)
    limits = intensity_limits(image, (1.0, 99.8))
    assert limits[:2] == (0, 0)
    assert np.isfinite(normalise(image, limits)).all()


def test_a_crop_with_the_limits_of_its_image_equals_the_crop_of_the_whole() -> None:
    image = RNG.integers(0, 1000, (50, 60, 3)).astype(np.uint16)
    image[:25] //= 10  # so that the crop's own limits are others
    limits = intensity_limits(image, (1.0, 99.8))
    np.testing.assert_array_equal(
        normalise(image[5:20, 7:33], limits), normalise(image, limits)[5:20, 7:33]
    )


MASK = np.where(BINARY, 255, 0).astype(np.uint8)
NUMBERED = RNG.integers(0, 400, (40, 56)).astype(np.uint16)
# As those of Glasbey in Fiji: each number has a colour, 0 is black.
BRIGHT = np.vstack([np.zeros((1, 3)), RNG.permuted(np.arange(255 * 3)).reshape(255, 3) % 256])
BRIGHT = BRIGHT.astype(np.uint8)


def indexed(numbers: np.ndarray, colours: np.ndarray) -> bytes:
    picture = Image.fromarray(numbers).convert("P")
    picture.putpalette(colours.tobytes())
    return pillow(picture, "PNG")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(pillow(MASK, "PNG"), MASK, id="grey"),
        pytest.param(pillow(thrice(MASK), "PNG"), MASK, id="RGB"),
        pytest.param(pillow(with_alpha(thrice(MASK)), "PNG"), MASK, id="RGBA"),
        pytest.param(pillow(Image.fromarray(with_alpha(MASK)), "PNG"), MASK, id="LA"),
        pytest.param(pillow(BILEVEL, "PNG"), BINARY, id="1-bit"),
        pytest.param(pillow(NUMBERED, "PNG"), NUMBERED, id="16-bit PNG"),
        pytest.param(tiff(NUMBERED, compression="zlib"), NUMBERED, id="16-bit TIFF"),
        pytest.param(tiff(NUMBERED.astype(np.uint32) * 500), NUMBERED * 500.0, id="32-bit"),
        pytest.param(tiff(NUMBERED.astype(np.float32)), NUMBERED, id="float"),
        pytest.param(tiff(NUMBERED.astype(np.int16)), NUMBERED, id="signed"),
        pytest.param(
            tiff(MASK, photometric="palette", colormap=BRIGHT.T.astype(np.uint16) * 257),
            MASK,
            id="Glasbey",
        ),
        pytest.param(indexed(MASK, BRIGHT), MASK, id="indexed PNG"),
    ],
)
def test_labels_are_read_as_stored(data: bytes, expected: np.ndarray) -> None:
    labels = read_labels(data, "labels")
    assert labels.dtype.kind in "bui"
    np.testing.assert_array_equal(labels, expected)


def spoilt(value: float, dtype: type) -> bytes:
    labels = NUMBERED.astype(dtype)
    labels[5, 5] = value
    return tiff(labels)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(pillow(RGB, "PNG"), "colour", id="RGB"),
        pytest.param(pillow(SIXTEEN_COLOURS, "PNG"), "colour", id="palette"),
        pytest.param(indexed(MASK, BRIGHT[::-1]), "colour", id="palette of another background"),
        pytest.param(spoilt(0.5, np.float32), "fractions", id="fraction"),
        pytest.param(spoilt(np.nan, np.float32), "fractions", id="NaN"),
        pytest.param(spoilt(np.inf, np.float32), "fractions", id="infinite"),
        pytest.param(spoilt(-1, np.int16), "negative", id="negative"),
        pytest.param(spoilt(-1, np.float32), "negative", id="negative float"),
        pytest.param(b"", "empty", id="empty file"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^well/mask: .*{reason}"):
        read_labels(data, "well/mask")


def test_colours_are_judged_by_pixels_of_the_whole_picture() -> None:
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[300:] = (200, 120, 0)  # beyond the first 65,536 pixels
    assert colours_of(pixels)[0] == slice(0, 1)


@pytest.mark.parametrize("ground", [0, 255, np.nan])
def test_fault_13_a_speck_of_colour_is_none(ground: float) -> None:
    pixels = np.full((400, 400, 3), ground, np.float32)
    pixels[101, 101] = (250, 240, 250)  # not among the pixels that are looked at
    assert colours_of(pixels) == (slice(None), "")


@pytest.mark.parametrize(("blue", "taken"), [(120, 2), (60, 1)])
def test_cells_that_fill_the_field_are_no_tissue(blue: int, taken: int) -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:80, :, 1] = 235  # cells, as of GFP
    pixels[20:40, 20:40, 2] = blue  # a nucleus in one
    colour = recordings.COLOURS[taken]
    note = f"several colours on black, took {colour}; --data.channel picks another"
    assert colours_of(pixels) == (slice(taken, taken + 1), note)


def test_few_nuclei_on_black_show_their_colour() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[40:50, 40:50] = (0, 180, 0)  # a hundredth of the picture
    assert colours_of(pixels)[0] == slice(1, 2)


@pytest.mark.parametrize("colour", [0, 1])
def test_white_text_is_not_blue(colour: int) -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[40:60, 40:60, colour] = 180
    pixels[90:93, 50:95] = 255
    assert colours_of(pixels) == (slice(colour, colour + 1), "")


@pytest.mark.parametrize("quality", [75, 90])
@pytest.mark.parametrize("level", [80, 200])
def test_jpeg_turns_no_green_into_blue(level: int, quality: int) -> None:
    rows, columns = np.mgrid[:128, :128]
    pixels = np.zeros((128, 128, 3), np.uint8)
    for row, column in RNG.integers(10, 118, (12, 2)):
        near = 1 / (1 + np.exp(np.hypot(rows - row, columns - column) - 8))
        pixels[..., 1] = np.maximum(pixels[..., 1], level * near)
    read = np.asarray(Image.open(io.BytesIO(pillow(pixels, "JPEG", quality=quality))))
    assert colours_of(read)[0] == slice(1, 2)


@pytest.mark.parametrize(
    "name",
    [
        "DRAQ5",
        "draq7",
        "SYTO 13",
        "H33342",
        "H3342",
        "SYTOX Green",
        "NucBlue",
        "TO-PRO-3",
        "H2BGFP",
    ],
)
def test_rarer_dyes_of_nuclei_are_known(name: str) -> None:
    pixels = np.zeros((1, 4, 4, 2), np.uint8)
    recording = Recording("", pixels, (), "", (), ("non-nuclear", name), False, None)
    assert channels_of(recording, None) == (slice(1, 2), "")


def test_a_word_of_the_file_name_is_no_name_of_a_channel() -> None:
    names = ("c:1/2 - GFP_DAPI.tif", "c:2/2 - GFP_DAPI.tif")
    recording = Recording("", np.zeros((1, 4, 4, 2)), (), "", (), names, False, None)
    number, note = channels_of(recording, None)
    assert number == slice(0, 1)
    assert "without a nuclear name" in note
    names = ("c:1/2 - GFP_DAPI.tif", "c:2/2 Hoechst - GFP_DAPI.tif")
    recording = Recording("", np.zeros((1, 4, 4, 2)), (), "", (), names, False, None)
    assert channels_of(recording, None) == (slice(1, 2), "")


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_holes_in_a_colour_picture_do_not_decide_its_colour(hole: float) -> None:
    pixels = np.zeros((40, 56, 3), np.float32)
    pixels[10:30, 10:30, 1] = 180
    pixels[:2, :, 0] = hole  # as a rotated picture has
    assert colours_of(pixels)[0] == slice(1, 2)


@pytest.mark.parametrize(("unit", "expected"), [("um", 1.5), ("nm", 0.0015), ("pixel", None)])
def test_the_step_in_z_has_the_unit_of_imagej(unit: str, expected: float | None) -> None:
    file = io.BytesIO()
    metadata = {"axes": "ZYX", "unit": unit, "spacing": 1.5}
    tifffile.imwrite(file, np.zeros((3, 8, 9), np.uint8), imagej=True, metadata=metadata)
    step = read_recording(file.getvalue(), "s.tif").z_step
    assert step == (expected and pytest.approx(expected))


def test_fractions_whose_white_is_0_are_turned_round() -> None:
    file, values = io.BytesIO(), np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    tifffile.imwrite(file, values, photometric="miniswhite")
    np.testing.assert_array_equal(read_recording(file.getvalue(), "a").pixels[0, ..., 0], -values)


def test_the_widest_range_of_float32_is_normalised() -> None:
    image = np.array([-3e38, 0, 3e38], np.float32).reshape(1, 1, 3)
    result = normalise(image, Limits(-3e38, 3e38))
    np.testing.assert_allclose(result.ravel(), [0, 0.5, 1], rtol=1e-6)


def test_the_picture_of_a_phone_is_the_first_of_its_frames() -> None:
    first, second = (Image.fromarray(pixels) for pixels in (SMOOTH, SMOOTH[::-1]))
    file = io.BytesIO()
    first.save(file, "MPO", save_all=True, append_images=[second], quality=95)
    found = read_recording(file.getvalue(), "a.jpg").pixels[0]
    assert np.abs(found.astype(int) - SMOOTH).mean() < 4


def test_a_tiff_that_does_not_say_whether_0_is_white_has_black_there() -> None:
    data = bytearray(tiff(DEEP[..., 0], photometric="minisblack", metadata=None))
    (first,) = struct.unpack("<I", data[4:8])
    place = data.index(struct.pack("<HHI", 262, 3, 1), first)
    data[place : place + 2] = struct.pack("<H", 65000)  # another tag, of one's own
    recording = read_recording(bytes(data), "a.tif")
    np.testing.assert_array_equal(recording.pixels[0, ..., 0], DEEP[..., 0])
    assert not recording.negative


def test_the_colours_in_which_imagej_shows_a_grey_image_are_not_its_pixels() -> None:
    ramp = np.arange(256, dtype=np.uint16) * 257
    orange, green = (ramp, ramp // 2, 0 * ramp), (0 * ramp, ramp, 0 * ramp)
    how: dict[str, Any] = {"photometric": "palette", "description": "ImageJ=1.54f\n"}
    for colours in (orange, green):
        shown = tiff(GREY, colormap=np.stack(colours), metadata=None, **how)
        np.testing.assert_array_equal(read_recording(shown, "a.tif").pixels[0, ..., 0], GREY)
        np.testing.assert_array_equal(read_labels(shown, "a.tif"), GREY)
    # Those of a picture whose colours were reduced are its pixels.
    palette = RNG.integers(0, 256, (3, 256), dtype=np.uint16)
    picture = tiff(GREY, colormap=palette * 257, metadata=None, **how)
    np.testing.assert_array_equal(read_recording(picture, "a.tif").pixels[0], palette.T[GREY])


def test_a_palette_of_16_bit_pixels_only_shows_them() -> None:
    deep = GREY.astype(np.uint16) * 10
    ramp = np.stack([np.arange(2**16, dtype=np.uint16)] * 3)
    recording = read_recording(tiff(deep, photometric="palette", colormap=ramp), "a.tif")
    np.testing.assert_array_equal(recording.pixels[0, ..., 0], deep)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_fault_2_what_is_called_an_image_starts_no_other_program(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "gs"  # Ghostscript, by which Pillow draws PostScript
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(InputError, match=f"^{name}: not an image, or damaged"):
        read_recording(pillow(GREY, "EPS"), name)
    assert not (tmp_path / "started").exists()


def test_jpeg_2000_is_nd2_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nd2", None)  # as where it is not installed
    data = b"\x00\x00\x00\x0cjP  \r\n\x87\n"
    for name, words in (("a.nd2", "needs the extra `vendor`"), ("a.tif", "not an image")):
        with pytest.raises(InputError, match=f"^{name}: .*{words}"):
            read_recording(data, name)


def test_want_of_memory_is_not_blamed_on_the_file() -> None:
    assert "copy it again" in str(recordings.unreadable("a.png", ValueError("odd")))
    line = str(recordings.unreadable("a.png", MemoryError()))
    assert line == "a.png: not enough memory left; --data.num_workers 0 needs less"


def micro_manager(pixels: np.ndarray, position: int) -> bytes:
    # A file of one plane, with its place among three positions, and what OME-XML says of them.
    height, width = pixels.shape
    images = "".join(
        f'<Image ID="Image:{p}"><Pixels ID="Pixels:{p}" DimensionOrder="XYCZT" Type="uint16" '
        f'SizeX="{width}" SizeY="{height}" SizeC="1" SizeZ="1" SizeT="1">'
        f'<Channel ID="Channel:{p}:0" Name="DAPI"/><TiffData IFD="0" PlaneCount="1">'
        f'<UUID FileName="Exp_MMStack_Pos{p}.ome.tif">urn:uuid:{p}</UUID></TiffData>'
        "</Pixels></Image>"
        for p in range(3)
    )
    space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    text = f'<OME xmlns="{space}" UUID="urn:uuid:{position}">{images}</OME>'.encode() + b"\0"
    summary = {"MicroManagerVersion": "2.0", "Frames": 1, "Positions": 3, "Prefix": "Exp"}
    said = json.dumps(summary).encode()
    said += b" " * (len(said) % 2)
    index, page = 40 + len(said), 68 + len(said)
    end = page + 162 + pixels.nbytes
    tags = {
        256: width, 257: height, 258: 16, 259: 1, 262: 1, 270: end + 8, 273: page + 162, 277: 1,
        278: height, 279: pixels.nbytes, 284: 1, 296: 1, 51123: end,
    }  # fmt: skip
    texts = {270: len(text), 51123: 8}  # of so many characters, elsewhere in the file
    content = b"".join(
        struct.pack("<HHII", tag, 2 if tag in texts else 4, texts.get(tag, 1), value)
        for tag, value in tags.items()
    )
    head = struct.pack("<7I", page, 54773648, index, 483765892, 0, 99384722, 0)
    head += struct.pack("<2I", 2355492, len(said)) + said
    head += struct.pack("<7I", 3453623, 1, 0, 0, 0, position, page)
    page_itself = struct.pack("<H", 13) + content + bytes(4) + pixels.tobytes()
    return b"II*\0" + head + page_itself + b'{"a":1}\0' + text


@pytest.mark.parametrize("by_windows", [False, True])
def test_a_position_of_micro_manager_is_read_without_the_others_beside_it(
    by_windows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiffs, "LARGE", 1000)
    for position in range(3):
        data = micro_manager(DEEP[..., position], position)
        (tmp_path / f"Exp_MMStack_Pos{position}.ome.tif").write_bytes(data)
    path = tmp_path / "Exp_MMStack_Pos1.ome.tif"
    with tifffile.TiffFile(path, _multifile=False) as alone:  # the defect
        assert alone.series[0].shape == (3, 40, 56)
    recording = read_recording(path, by_windows=by_windows)
    pixels = recording.pixels
    assert isinstance(pixels, Windows) == by_windows and recording.planes == ()
    found = pixels[0, slice(40), slice(56)]
    np.testing.assert_array_equal(found[..., 0], DEEP[..., 1])
    if isinstance(pixels, Windows):
        pixels.close()


def test_planes_that_were_never_recorded_are_told_from_a_cut_off_file(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        writer.write(np.stack([GREY] * 4), metadata={"axes": "ZYX"})
    data = (tmp_path / "a.ome.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        said = file.ome_metadata or ""
    assert 'PlaneCount="4"' in said
    stopped = said.replace('PlaneCount="4"', 'PlaneCount="3"')
    (tmp_path / "a.ome.tif").write_bytes(data.replace(said.encode(), stopped.encode()))
    with pytest.raises(InputError, match=r"planes that were never recorded: 1 of 4"):
        read_recording(tmp_path / "a.ome.tif")
