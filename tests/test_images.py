from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from cellseg.data.images import intensity_limits, is_image, normalise, read_image, read_labels
from cellseg.errors import InputError

FORMATS = Path(__file__).resolve().parents[2] / "shared" / "data" / "formats"

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
RGB = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
BINARY = GREY > 127
DEEP = RNG.integers(0, 65536, (40, 56, 3), dtype=np.uint16)
SIXTEEN_COLOURS = Image.fromarray(RGB).quantize(16)
# Lossy formats need a scene without noise.
_ROWS, _COLUMNS = np.mgrid[:40, :56]
SMOOTH = np.stack([4 * _COLUMNS, 6 * _ROWS, 250 - 2 * _ROWS - _COLUMNS], axis=2).astype(np.uint8)


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
    "TIFF, three channels of ImageJ": (tiff(PLANES, imagej=True, metadata={"axes": "CYX"}), RGB),
    "TIFF, palette": (pillow(SIXTEEN_COLOURS, "TIFF"), OF_16),
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
def test_every_stored_form_reads_as_the_rgb_picture_it_shows(form: str) -> None:
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


STACKS = {
    "z stack": (tiff(thrice(GREY).transpose(2, 0, 1), imagej=True, metadata={"axes": "ZYX"}), "3"),
    "time series": (tiff(np.stack([GREY] * 5), imagej=True, metadata={"axes": "TYX"}), "5"),
    "three pages": (
        pillow(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)] * 2),
        "3",
    ),
    "pages of tifffile": (tiff(np.stack([GREY] * 3), photometric="minisblack"), "3"),
    "two RGB planes": (tiff(np.stack([RGB] * 2), photometric="rgb"), "2"),
    "two channels": (tiff(np.stack([GREY] * 2), imagej=True, metadata={"axes": "CYX"}), "2"),
    "two channels of OME": (
        tiff(np.stack([GREY] * 2), photometric="minisblack", ome=True, metadata={"axes": "CYX"}),
        "2",
    ),
    "five channels": (tiff(np.stack([GREY] * 5), imagej=True, metadata={"axes": "CYX"}), "5"),
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks_and_other_channels_are_refused_with_their_shape(kind: str) -> None:
    data, planes = STACKS[kind]
    with pytest.raises(InputError) as caught:
        read_image(data, "plate/well.tif")
    message = str(caught.value)
    assert message.startswith("plate/well.tif: ")
    assert f"({planes} " in message and "40 Y x 56 X" in message


def test_several_series_are_refused() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(GREY)
        writer.write(GREY[:20])
    with pytest.raises(InputError, match=r"^plate/well\.tif: holds 2 images"):
        read_image(file.getvalue(), "plate/well.tif")


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


@pytest.mark.parametrize("fraction", [0.003, 0.2, 0.6])
@pytest.mark.parametrize("name", SOUND)
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, name: str, fraction: float) -> None:
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
def test_an_empty_or_fake_file_is_refused_by_name(
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


REAL = {
    "cp_fly_dna.TIF": ((1006, 1000, 3), np.uint8),
    "cp_speckles_hoechst.tif": ((1000, 1200, 3), np.uint16),
    "cp_vitra_channel1.tif": ((1024, 1360, 3), np.uint8),
    "cp_worms_w1_16bit.tif": ((520, 696, 3), np.uint16),
    "instanseg_HE_example.tif": ((1484, 1380, 3), np.uint8),
    "kidney_48_5_rgb.tif": ((901, 1493, 3), np.uint8),
    "osteosarcoma_rgb_lzw.tif": ((1104, 1376, 3), np.uint8),
    "stardist_histo.jpg": ((300, 500, 3), np.uint8),
    "stardist_img2d.tif": ((512, 512, 3), np.uint16),
    "test_image_SYX.ome.tif": ((513, 639, 3), np.uint8),
}
real = pytest.mark.skipif(not FORMATS.is_dir(), reason=f"no real microscopy files in {FORMATS}")


@real
@pytest.mark.parametrize("name", REAL)
def test_real_files_read_as_pillow_sees_them(name: str) -> None:
    shape, dtype = REAL[name]
    image = read_image(FORMATS / name)
    assert (image.shape, image.dtype) == (shape, dtype)
    with Image.open(FORMATS / name) as picture:
        # Right for these files, as none is 16-bit colour; those are where Pillow is wrong.
        seen = np.asarray(picture if picture.mode.startswith("I") else picture.convert("RGB"))
    assert (image == (thrice(seen) if seen.ndim == 2 else seen)).mean() > 0.999


@real
def test_the_real_two_channel_file_is_refused() -> None:
    path = FORMATS / "instanseg_fluorescence_multich.tif"
    with pytest.raises(InputError, match=r"multich\.tif: .*2 C x 450 Y x 450 X"):
        read_image(path)


@real
def test_a_real_label_image_keeps_its_numbers() -> None:
    path = FORMATS / "stardist_mask2d_label16.tif"
    labels = read_labels(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(labels, np.asarray(picture))
    assert labels.max() == 183


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_limits_are_percentiles_of_all_channels_together(dtype: type) -> None:
    # 201 values a step apart: percentile p is the value 2 p.
    values = np.random.default_rng(0).permutation(201).reshape(67, 1, 3).astype(dtype)
    np.testing.assert_allclose(intensity_limits(values, (1.0, 99.75)), (2, 199.5))
    np.testing.assert_allclose(intensity_limits(values, (0.0, 100.0)), (0, 200))


def test_intensities_between_the_limits_become_0_to_1() -> None:
    image = np.array([0, 50, 60, 75, 150, 200], np.uint8).reshape(1, 2, 3)
    result = normalise(image, np.array([50.0, 150.0]))
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
def test_a_scene_normalises_the_same_whatever_range_it_is_stored_in(form: str) -> None:
    scene = np.clip(RNG.normal(60, 20, (64, 64, 3)), 10, 200).astype(np.uint8)
    stored = AS_STORED[form](scene)
    percentiles = (1.0, 99.8)
    expected = normalise(scene, intensity_limits(scene, percentiles))
    result = normalise(stored, intensity_limits(stored, percentiles))
    assert expected.std() > 0.1
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-2)


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
def test_a_constant_image_becomes_black(dtype: type, level: int) -> None:
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
    np.testing.assert_allclose(normalise(image, np.array([99.7, 100.0])), 0.3, atol=1e-5)


def test_limits_ignore_nan_and_infinite_pixels() -> None:
    image = RNG.normal(5, 2, (30, 30, 3)).astype(np.float32)
    holes = RNG.random(image.shape) < 0.1
    finite = image[~holes]
    image[holes] = RNG.choice([np.nan, np.inf, -np.inf], holes.sum())
    limits = intensity_limits(image, (1.0, 99.8))
    np.testing.assert_allclose(limits, np.percentile(finite, (1.0, 99.8)), rtol=1e-6)
    result = normalise(image, limits)
    np.testing.assert_array_equal(result[np.isnan(image) | np.isneginf(image)], 0)
    np.testing.assert_array_equal(result[np.isposinf(image)], 1)
    expected = np.clip((finite - limits[0]) / (limits[1] - limits[0]), 0, 1)
    np.testing.assert_allclose(result[~holes], expected, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_without_a_finite_pixel_stays_finite(value: float) -> None:
    image = np.full((4, 4, 3), value, np.float32)
    limits = intensity_limits(image, (1.0, 99.8))
    assert (limits == 0).all()
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
