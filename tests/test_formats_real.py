"""Real microscopy files, in the forms labs have them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import cellseg
from cellseg.reading.channels import to_rgb_planes
from cellseg.reading.images import read_labels, read_recording
from conftest import SHARED

FORMATS = SHARED / "data" / "formats"
pytestmark = pytest.mark.skipif(
    not FORMATS.is_dir(), reason=f"no real microscopy files in {FORMATS}"
)

COLOUR = ("red", "green", "blue")
# Shape, type, channels, and the size of a pixel in um where the file tells.
REAL = {
    "cp_fly_dna.TIF": ((1006, 1000), np.uint8, ("0",), None),
    "cp_speckles_hoechst.tif": ((1000, 1200), np.uint16, ("0",), None),
    "cp_vitra_channel1.tif": ((1024, 1360), np.uint8, ("0",), None),
    "cp_worms_w1_16bit.tif": ((520, 696), np.uint16, ("0",), None),
    "instanseg_HE_example.tif": ((1484, 1380), np.uint8, COLOUR, 0.50008),
    "kidney_48_5_rgb.tif": ((901, 1493), np.uint8, COLOUR, None),
    "osteosarcoma_rgb_lzw.tif": ((1104, 1376), np.uint8, COLOUR, None),
    "stardist_histo.jpg": ((300, 500), np.uint8, COLOUR, None),
    "stardist_img2d.tif": ((512, 512), np.uint16, ("0",), None),
    "test_image_SYX.ome.tif": ((513, 639), np.uint8, COLOUR, 1.0),
}
# Composites on black, and the channel that is looked at.
ON_BLACK = {"osteosarcoma_rgb_lzw.tif": 2, "test_image_SYX.ome.tif": 2}


@pytest.mark.parametrize("name", REAL)
def test_real_files_read_as_pillow_sees_them(name: str) -> None:
    shape, dtype, channels, pixel_size = REAL[name]
    recording = read_recording(FORMATS / name)
    assert recording.pixels.shape == (1, *shape, len(channels))
    assert recording.pixels.dtype == dtype
    assert (recording.channels, recording.colour) == (channels, channels == COLOUR)
    assert recording.pixel_size == (pixel_size and pytest.approx(pixel_size, rel=1e-5))
    with Image.open(FORMATS / name) as picture:
        # Right for these files, as none is 16-bit colour; those are where Pillow is wrong.
        seen = np.asarray(picture if picture.mode.startswith("I") else picture.convert("RGB"))
    image = recording.pixels[0]
    assert (image == (seen[..., None] if seen.ndim == 2 else seen)).mean() > 0.999
    [shown], note = to_rgb_planes(recording)
    if name in ON_BLACK:
        assert (shown == image[..., ON_BLACK[name], None]).all()
        assert "several colours on black" in note
    else:
        assert (shown == image).all()
        assert note == ""


def test_of_the_real_two_channels_the_blue_one_is_taken_which_has_the_nuclei() -> None:
    recording = read_recording(FORMATS / "instanseg_fluorescence_multich.tif")
    assert recording.pixels.shape == (1, 450, 450, 2)
    assert recording.channels == ("green", "blue")
    [image], note = to_rgb_planes(recording)
    assert "took blue; --data.channel" in note
    with Image.open(FORMATS / "instanseg_fluorescence_multich.tif") as pages:
        pages.seek(1)
        np.testing.assert_array_equal(image[..., 0], np.asarray(pages))


def test_a_real_label_image_keeps_its_numbers() -> None:
    path = FORMATS / "stardist_mask2d_label16.tif"
    labels = read_labels(path)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(labels, np.asarray(picture))
    assert labels.max() == 183


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("place", [np.s_[:450, :700], np.s_[550:800, 1050:1450]])
def test_the_empty_glass_of_a_slide_has_no_nuclei(place: tuple[slice, slice], grey: bool) -> None:
    glass = read_recording(FORMATS / "kidney_48_5_rgb.tif").pixels[0][place]
    labels = cellseg.load("nuclei-1").predict(glass[..., 1] if grey else glass)
    assert labels.max() < 4  # there is some dust
