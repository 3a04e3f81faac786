from __future__ import annotations

import csv
import pickle
import shutil
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from cellseg.data.cache import prepare
from cellseg.data.folders import find_samples, open_tree
from cellseg.data.listing import files_to_predict
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.reading import ome_zarr, recording
from cellseg.reading.images import read_recording
from cellseg.reading.recording import Windows
from conftest import cellseg

GREY = generate(0, size=128)[0][:100, :90, 0]
STACK = np.stack([GREY, GREY // 2, 255 - GREY, GREY // 3]).reshape(1, 2, 2, 100, 90)  # TCZYX


def write(path: Path, version: str) -> Path:
    """As the specification of OME-Zarr has it, with a smaller copy."""
    scales: dict[str, Any] = {
        "axes": [
            {"name": "t", "type": "time"},
            {"name": "c", "type": "channel"},
            *({"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"),
        ],
        "datasets": [
            {
                "path": str(level),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1, 1, 2, 0.25 * 2**level, 0.25 * 2**level]}
                ],
            }
            for level in range(2)
        ],
        "version": version,
    }
    content = {
        "multiscales": [scales],
        "omero": {"channels": [{"label": "actin"}, {"label": "DAPI"}]},
    }
    if version == "0.3":
        scales["axes"] = [axis["name"] for axis in scales["axes"]]
    if version == "0.2":
        del scales["axes"]
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    group.attrs.update({"ome": content} if version == "0.5" else content)
    for level in range(2):
        data = STACK[..., :: 2**level, :: 2**level]
        group.create_array(str(level), data=data, chunks=(1, 1, 1, 32, 32))
    return path


@pytest.mark.parametrize("version", ["0.2", "0.3", "0.4", "0.5"])
def test_an_ome_zarr_is_read_whole_and_by_windows(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.ome.zarr", version)
    whole = read_recording(path, by_windows=True)
    np.testing.assert_array_equal(whole.pixels, STACK[0].transpose(1, 2, 3, 0))
    assert (whole.channels, whole.plane_axes) == (("actin", "DAPI"), "Z")
    assert whole.plane_shape == (2,)  # the one point in time is no axis
    assert whole.pixel_size == (0.25 if version >= "0.4" else None)
    assert whole.z_step == (2 if version >= "0.4" else None)
    monkeypatch.setattr(ome_zarr, "LARGE", 1000)
    parts = read_recording(path, by_windows=True)
    assert isinstance(parts.pixels, Windows)
    assert not isinstance(read_recording(path).pixels, Windows)  # as for training
    assert parts.pixels.shape == whole.pixels.shape
    windows = pickle.loads(pickle.dumps(parts.pixels))
    at = (slice(20, 71), slice(0, 90))
    np.testing.assert_array_equal(windows[1, *at], whole.pixels[1, *at])
    windows.close()


def test_a_plain_array_is_an_image_too(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "a.zarr", data=GREY)
    np.testing.assert_array_equal(read_recording(tmp_path / "a.zarr").pixels[0, ..., 0], GREY)


def test_fault_2_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    (tmp_path / "b.zarr").mkdir()
    zarr.create_array(tmp_path / "c.zarr", data=np.zeros(3))
    zarr.create_array(tmp_path / "d.zarr", data=np.zeros((1,) * 6))
    zarr.create_array(tmp_path / "e.zarr" / "0", data=GREY)  # in a group that says nothing of it
    zarr.open_group(tmp_path / "e.zarr")
    for name, what in (
        ("a.zarr", "a zarr group without"),
        ("b.zarr", "a folder, but no zarr"),
        ("c.zarr", "an array of 1 axes; 2 to 5 are read"),
        ("d.zarr", "an array of 6 axes; 2 to 5 are read"),
        ("e.zarr", "a zarr group without"),
    ):
        with pytest.raises(InputError, match=rf"^{name}: {what}"):
            read_recording(tmp_path / name, name)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("noise", [0, 60])
def test_fault_2_a_chunk_that_is_cut_off_is_refused(
    noise: int, zarr_format: Any, tmp_path: Path
) -> None:
    # Where Blosc cannot compress it stores, and does not see where that ends.
    pixels = GREY // 2 + np.random.default_rng(0).integers(0, noise + 1, GREY.shape, np.uint8)
    codec = zarr.codecs.BloscCodec() if zarr_format == 3 else numcodecs.Blosc()
    path = tmp_path / "a.zarr"
    whole = zarr.create_array(
        path, shape=pixels.shape, dtype=pixels.dtype, chunks=(64, 64), compressors=codec,
        zarr_format=zarr_format,
    )  # fmt: skip
    whole[:] = pixels
    np.testing.assert_array_equal(read_recording(path, "a.zarr").pixels[0, ..., 0], pixels)
    chunk = path / ("c/0/0" if zarr_format == 3 else "0.0")
    content = chunk.read_bytes()
    chunk.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"^a\.zarr: cannot be read: a chunk is cut off"):
        read_recording(path, "a.zarr")


def test_axes_are_known_by_their_type_whatever_their_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", "0.4")
    group = zarr.open_group(path, mode="r+")
    (scales,) = group.attrs["multiscales"]  # type: ignore[misc]
    axes: list[dict[str, str]] = scales["axes"]  # type: ignore[assignment, call-overload, index]

    def name(*names: str) -> None:
        named = [{**axis, "name": name} for axis, name in zip(axes, names, strict=True)]
        group.attrs["multiscales"] = [{**scales, "axes": named}]  # type: ignore[dict-item]

    name("frame", "wavelength", "z", "y", "x")
    read = read_recording(path, path.name)
    assert (read.channels, read.plane_axes) == (("actin", "DAPI"), "Z")
    for odd in ("y, y, x", "z, row, x"):
        name("t", "c", *odd.split(", "))
        with pytest.raises(InputError, match=rf"^a\.zarr: axes are t, c, {odd}; export it"):
            read_recording(path, path.name)


def test_fault_31_what_does_not_fit_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.zarr", "0.5")
    monkeypatch.setattr(recording, "memory_limit", lambda: STACK.size - 1)
    with pytest.raises(InputError, match=r"^a\.zarr: .*memory"):
        read_recording(path, "a.zarr")


def test_fault_2_plates_and_images_without_their_pixels_are_named(tmp_path: Path) -> None:
    plate = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}]}
    write(tmp_path / "a.zarr" / "A" / "1" / "0", "0.4")
    with pytest.raises(InputError, match=r"^a\.zarr: a plate; copy its fields"):
        read_recording(tmp_path / "a.zarr", "a.zarr")
    path = write(tmp_path / "b.zarr", "0.4")
    shutil.rmtree(path / "0")
    with pytest.raises(InputError, match=r"^b\.zarr: its full size, 0, is missing"):
        read_recording(path, "b.zarr")


def test_an_image_may_lie_in_a_group_of_its_own_but_not_several(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    zarr.open_group(path, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write(path / "0", "0.4")
    recording = read_recording(path, "a.zarr")
    np.testing.assert_array_equal(recording.pixels[..., 0].reshape(2, 100, 90), STACK[0, 0])
    write(path / "1", "0.4")
    with pytest.raises(InputError, match=r"^a\.zarr: several images"):
        read_recording(path, "a.zarr")


def test_a_folder_of_chunks_is_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "deep" / "a.zarr", "0.5")
    assert files_to_predict(tmp_path / "in", [], []) == (tmp_path / "in", {"deep/a.zarr": "deep/a"})
    assert files_to_predict(path, [], []) == (path.parent, {"a.zarr": "a"})


def test_an_ome_zarr_is_predicted_and_again_only_when_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "in" / "a.ome.zarr", "0.4")
    paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
    assert cellseg("predict", "--data.num_workers", 0, *paths) == 0
    labels = tifffile.imread(tmp_path / "out" / "a.ome_labels.tif")
    assert labels.shape == (2, 100, 90)
    with (tmp_path / "out" / "objects.csv").open() as lines:
        row = next(csv.DictReader(lines))
    assert "mean_DAPI" in row
    assert float(row["area_um2"]) == float(row["area_px"]) / 16
    capsys.readouterr()
    assert cellseg("predict", "--data.num_workers", 0, *paths) == 0
    assert "1 of 1 images are done already" in capsys.readouterr().err
    zarr.open_group(path, mode="r+")["0"][:] = 255 - STACK
    assert cellseg("predict", "--data.num_workers", 0, *paths) == 0
    assert "Done again: 1 image, because " in capsys.readouterr().err


def test_an_ome_zarr_is_trained_on(tmp_path: Path) -> None:
    for number in range(2):
        image, labels = generate(number, size=64)
        scales = [{"datasets": [{"path": "0"}], "axes": [{"name": "y"}, {"name": "x"}]}]
        group = zarr.create_group(
            tmp_path / f"i{number}.zarr", zarr_format=2, attributes={"multiscales": scales}
        )
        group.create_array("0", data=image[..., 0])
        tifffile.imwrite(tmp_path / f"i{number}_labels.tif", labels)
    tree = open_tree(tmp_path)
    annotated = prepare(tree, find_samples(tree)[0], tmp_path / "cache")
    assert [sample.id for sample in annotated] == ["i0", "i1"]
    np.testing.assert_array_equal(annotated[1].image(), generate(1, size=64)[0])
    before = [sample.folder for sample in annotated]
    group["0"][:] = 0
    after = [s.folder for s in prepare(tree, find_samples(tree)[0], tmp_path / "cache")]
    assert (after[0], after[1] != before[1]) == (before[0], True)


def test_a_scale_of_all_levels_is_one_more_factor(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", "0.4")
    group = zarr.open_group(path, mode="r+")
    (scales,) = group.attrs["multiscales"]  # type: ignore[misc]
    more = {"type": "scale", "scale": [1, 1, 3, 0.5, 0.5]}
    group.attrs["multiscales"] = [{**scales, "coordinateTransformations": [more]}]  # type: ignore[dict-item]
    recording = read_recording(path, path.name)
    assert (recording.pixel_size, recording.z_step) == (0.125, 6)


def test_what_an_ome_zarr_leaves_empty_or_numbers_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.zarr", "0.4")
    group = zarr.open_group(path, mode="r+")
    (scales,) = group.attrs["multiscales"]  # type: ignore[misc]
    axes = [{**axis, "unit": None} for axis in scales["axes"]]  # type: ignore[call-overload, index]
    odd = {**scales, "axes": axes, "coordinateTransformations": None}  # type: ignore[dict-item]
    group.attrs["multiscales"] = [odd]
    group.attrs["omero"] = {"channels": [{"label": 405}, {"label": None}]}
    recording = read_recording(path, path.name)
    assert (recording.channels, recording.pixel_size) == (("405", "1"), None)
