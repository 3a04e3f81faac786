from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import roifile
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage.measure import regionprops

from cellseg.data.outlines import read_geojson, read_rois
from cellseg.data.synthetic import generate
from cellseg.instances import Decoding
from cellseg.predict import formats, pictures, tables
from cellseg.predict.drafts import Drafts
from cellseg.predict.journal import Journal
from cellseg.predict.store import Place
from cellseg.predict.tables import write_tables
from cellseg.predict.writer import PredictionWriter
from cellseg.reading.images import read_labels, read_recording
from conftest import cellseg

Run = Callable[..., int]

ROW = {"file": "a", "plane": "", "status": "ok", "scale": "1", "nuclei": 1}


@pytest.fixture
def predict(tmp_path: Path) -> Run:
    """Predicts the folder `in` into the folder `out` with the model of the package."""

    def run(*more: object) -> int:
        paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
        how = ("--data.diameter", "none", "--data.num_workers", 0)
        return cellseg("predict", *paths, *how, *more)

    return run


def save(path: Path, number: int = 3, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generate(number, size=size)[0]).save(path)
    return path


def stack(path: Path, planes: int = 3) -> NDArray[np.uint8]:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.stack([generate(number, size=64)[0][..., 0] for number in range(3, 3 + planes)])
    tifffile.imwrite(path, pixels, photometric="minisblack")
    return pixels


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def content(folder: Path) -> dict[str, bytes]:
    """What the results are, but for the times in them."""
    timed = {"summary.csv", "run.json", "report.html"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in timed and ".cellseg" not in path.parts
    }


def test_every_format_holds_the_same_nuclei(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict("--output.formats", "all") == 0
    out = tmp_path / "out"
    labels = tifffile.imread(out / "a_labels.tif")
    assert labels.max() > 1
    shape = labels.shape
    np.testing.assert_array_equal(read_rois(out / "a_rois.zip", shape), labels)
    np.testing.assert_array_equal(read_geojson(out / "a.geojson", shape), labels)
    assert len(roifile.roiread(out / "a_rois.zip")) == labels.max()
    rows = table(out / "objects.csv")
    for region, row in zip(regionprops(labels), rows, strict=True):
        assert (row["file"], row["plane"], row["label"]) == ("a.png", "", str(region.label))
        assert int(row["area_px"]) == region.area
        assert float(row["centroid_x_px"]) == pytest.approx(region.centroid[1], rel=1e-6)
        assert 0 < float(row["confidence"]) <= 1
    parquet = pyarrow.parquet.read_table(out / "objects.parquet").to_pylist()
    assert [row["area_px"] for row in parquet] == [int(row["area_px"]) for row in rows]
    features = json.loads((out / "a.geojson").read_text())["features"]
    assert features[0]["properties"]["measurements"]["area_px"] == int(rows[0]["area_px"])
    rle = table(out / "rle.csv")
    assert [row["ImageId"] for row in rle] == ["a"] * len(rows)
    runs = [list(map(int, row["EncodedPixels"].split())) for row in rle]
    assert [sum(run[1::2]) for run in runs] == [int(row["area_px"]) for row in rows]
    coco = json.loads((out / "a_coco.json").read_text())
    assert [a["area"] for a in coco["annotations"]] == [int(row["area_px"]) for row in rows]
    probs = tifffile.imread(out / "a_probs.tif")
    assert probs.dtype == np.uint8
    assert probs.shape == shape
    assert "a_overlay.png" in (out / "report.html").read_text()


def test_images_that_are_rescaled_are_counted_and_have_the_flag(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict("--data.diameter", 40) == 0
    assert "1 image, 0 errors, 1 nucleus, 1 rescaled; see" in re.sub(
        r"\d+ nuclei", "1 nucleus", capfd.readouterr().err
    )
    (row,) = table(tmp_path / "out" / "summary.csv")
    assert row["scale"] == "0.5"
    assert row["message"].endswith("rescaled by 0.5 (--data.diameter 40)")


def test_tables_of_a_run_in_which_nothing_could_be_done_have_their_headers(
    predict: Run, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    assert predict("--output.formats", "all") == 1
    assert (tmp_path / "out" / "objects.csv").read_text() == "file,plane,label\n"
    assert (tmp_path / "out" / "rle.csv").read_text() == "ImageId,EncodedPixels\n"
    assert pyarrow.parquet.read_table(tmp_path / "out" / "objects.parquet").num_rows == 0


@pytest.mark.parametrize("name", ['a, "b"', "a\nb"])
def test_what_a_name_holds_leaves_the_tables_whole(name: str, predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / f"{name}.png")
    assert predict("--output.formats", "table,rle,parquet") == 0
    assert {row["file"] for row in table(tmp_path / "out" / "objects.csv")} == {f"{name}.png"}
    assert {row["ImageId"] for row in table(tmp_path / "out" / "rle.csv")} == {name}
    parquet = pyarrow.parquet.read_table(tmp_path / "out" / "objects.parquet")
    assert set(parquet["file"].to_pylist()) == {f"{name}.png"}


def test_the_ids_of_run_lengths_are_those_of_the_competition(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "k1" / "images" / "k1.png")
    save(tmp_path / "in" / "k2" / "images" / "other.png")
    assert predict("--output.formats", "rle") == 0
    ids = {row["ImageId"] for row in table(tmp_path / "out" / "rle.csv")}
    assert ids == {"k1", "k2/images/other"}


def test_an_old_result_that_cannot_be_deleted_stops_nothing(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict("--output.formats", "labels,rois,table") == 0
    unlink = Path.unlink

    def in_use(path: Path, missing_ok: bool = False) -> None:
        if path.name in ("a_rois.zip", "objects.csv"):
            raise PermissionError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", in_use)
    assert predict("--output.formats", "labels") == 0
    assert (tmp_path / "out" / "a_labels.tif").is_file()
    said = capfd.readouterr().err
    assert "a_rois.zip: cannot be deleted" in said and "objects.csv: cannot be deleted" in said


def test_only_the_formats_asked_for_are_written(
    predict: Run, tmp_path: Path, fails: Callable[..., str]
) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict("--output.formats", "rois,labels") == 0
    assert set(content(tmp_path / "out")) == {"a_labels.tif", "a_rois.zip"}
    source = ("--data.predict_dir", tmp_path / "in")
    assert "overlay" in fails("predict", *source, "--output.formats", "labels,xls")


def test_fault_7_every_plane_of_a_stack_is_predicted(predict: Run, tmp_path: Path) -> None:
    pixels = stack(tmp_path / "in" / "s.tif")
    assert predict("--output.formats", "all") == 0
    out = tmp_path / "out"
    labels = tifffile.imread(out / "s_labels.tif")
    assert labels.shape == pixels.shape
    counts = [len(np.unique(plane)) - 1 for plane in labels]
    assert min(counts) > 0
    assert [plane.max() for plane in labels] == counts  # ids start again in each plane
    rows = table(out / "summary.csv")
    assert [(row["plane"], int(row["nuclei"])) for row in rows] == list(
        zip("012", counts, strict=True)
    )
    objects = table(out / "objects.csv")
    assert [sum(row["plane"] == plane for row in objects) for plane in "012"] == counts
    run = json.loads((out / "run.json").read_text())
    assert run["planes"] == 3
    assert "nuclei" not in run
    assert "nuclei found" not in (out / "report.html").read_text()


@pytest.mark.parametrize(("plane", "expected"), [("max", "max"), ("1", 1)])
def test_one_plane_of_a_stack_is_predicted_on_demand(
    plane: str, expected: object, predict: Run, tmp_path: Path
) -> None:
    pixels = stack(tmp_path / "in" / "s.tif")
    chosen = pixels.max(0) if plane == "max" else pixels[1]
    Image.fromarray(chosen).save(tmp_path / "in" / "single.png")
    config = tmp_path / "config.yaml"  # where a number needs no quotes
    config.write_text(f"data:\n  plane: {plane}\n")
    assert predict("--config", config, "--data.include", "s.tif") == 0
    labels = tifffile.imread(tmp_path / "out" / "s_labels.tif")
    shutil.rmtree(tmp_path / "out")
    assert predict("--data.include", "single.png") == 0
    np.testing.assert_array_equal(labels, tifffile.imread(tmp_path / "out" / "single_labels.tif"))


def test_one_plane_keeps_its_number_in_every_format(predict: Run, tmp_path: Path) -> None:
    stack(tmp_path / "in" / "s.tif")
    assert predict("--data.plane", 1, "--output.formats", "rois,geojson,rle,coco") == 0
    out = tmp_path / "out"
    rois = roifile.roiread(out / "s_rois.zip")
    assert {roi.position for roi in rois} == {2}
    assert {roi.name[:5] for roi in rois} == {"0002-"}
    features = json.loads((out / "s.geojson").read_text())["features"]
    assert {feature["geometry"]["plane"]["z"] for feature in features} == {1}
    assert {row["ImageId"] for row in table(out / "rle.csv")} == {"s#2"}
    assert [i["id"] for i in json.loads((out / "s_coco.json").read_text())["images"]] == [2]


def test_the_report_shows_the_overlay_of_a_stack_once(predict: Run, tmp_path: Path) -> None:
    stack(tmp_path / "in" / "s.tif")
    assert predict() == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('href="s_overlay.png"') == page.count("<img") == 1


@pytest.mark.parametrize(
    ("axes", "shape", "plane", "expected"),
    [
        ("TYX", (3,), "all", [(0, 0), (0, 1), (0, 2)]),
        ("ZYX", (3,), "all", [(0, 0), (1, 0), (2, 0)]),
        ("ZCYX", (2, 2), "all", [(0, 0), (1, 0)]),
        ("TZYX", (2, 2), "all", [(0, 0), (1, 0), (0, 1), (1, 1)]),
        ("TZYX", (2, 2), "1", [(1, 0)]),
    ],
)
def test_outlines_lie_where_their_plane_does(
    axes: str, shape: tuple[int, ...], plane: str, expected: list[tuple[int, int]],
    predict: Run, tmp_path: Path,
) -> None:  # fmt: skip
    image = generate(3, size=64)[0][..., 0]
    (tmp_path / "in").mkdir()
    pixels = np.broadcast_to(image, (*shape, 64, 64))
    tifffile.imwrite(tmp_path / "in" / "s.tif", pixels, imagej=True, metadata={"axes": axes})
    assert predict("--output.formats", "rois,geojson", "--data.plane", plane) == 0
    out = tmp_path / "out"
    features = json.loads((out / "s.geojson").read_text())["features"]
    planes = [feature["geometry"]["plane"] for feature in features]
    assert list(dict.fromkeys((p["z"], p["t"]) for p in planes)) == expected
    rois = roifile.roiread(out / "s_rois.zip")
    found = dict.fromkeys((roi.position, roi.z_position, roi.t_position) for roi in rois)
    if len(shape) == 1 and "C" not in axes:  # no hyperstack: slices have one number
        assert list(found) == [(place + 1, 0, 0) for place in range(len(expected))]
    else:
        assert list(found) == [(0, z + 1, t + 1) for z, t in expected]


def test_what_a_person_corrected_is_set_aside(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png")
    out = tmp_path / "out"
    out.mkdir()
    mine = np.eye(64, dtype=np.uint16)
    tifffile.imwrite(out / "b_labels.tif", mine)  # before the first run
    assert predict("--output.formats", "labels,rois") == 0
    np.testing.assert_array_equal(tifffile.imread(out / "b_labels.tif.edited"), mine)
    assert tifffile.imread(out / "b_labels.tif").max() > 1
    outline = tmp_path / "mine.zip"
    roifile.roiwrite(outline, [roifile.ImagejRoi.frompoints([[1, 2], [3, 4], [3, 2]])], mode="w")
    for number in (1, 2):
        written = tifffile.imread(out / "a_labels.tif")
        tifffile.imwrite(out / "a_labels.tif", mine * number)
        shutil.copy(outline, out / "a_rois.zip")
        capfd.readouterr()
        assert predict("--output.formats", "labels,rois") == 0
        assert "a_labels.tif.edited" in capfd.readouterr().err
        np.testing.assert_array_equal(tifffile.imread(out / "a_labels.tif"), written)
    for number, name in enumerate(("edited", "edited1"), 1):
        kept = tifffile.imread(out / f"a_labels.tif.{name}")
        np.testing.assert_array_equal(kept, mine * number)
        assert (out / f"a_rois.zip.{name}").read_bytes() == outline.read_bytes()
    # Damage is no correction.
    (out / "a_labels.tif").write_bytes((out / "a_labels.tif").read_bytes()[:-40])
    assert predict("--output.formats", "labels,rois") == 0
    assert len(list(out.glob("a_labels.tif*"))) == 3


def test_no_file_of_a_person_is_overwritten(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    every = ("--output.formats", "all")
    assert predict(*every) == 0
    names = [path.name for path in out.iterdir() if path.is_file()]
    assert len(names) == 12
    assert not any(b"\r" in (out / name).read_bytes() for name in names if name.endswith(".csv"))
    ours = {name: (out / name).read_bytes() for name in names}
    # Without the journal, what has no tag of ours may be anybody's, also what we cannot read.
    shutil.rmtree(out / ".cellseg")
    (out / "a_overlay.png").write_bytes(b"a picture of another kind")
    for name in ("run.json", "summary.csv", "report.html"):  # a run as long may give the same
        (out / name).write_bytes(ours[name] + b"\n")
    assert predict(*every) == 0
    untagged = {"summary.csv", "report.html", "run.json", "a.geojson", "a_coco.json", "a_rois.zip"}
    untagged.add("a_overlay.png")
    assert {path.name for path in out.glob("*.edited")} == {f"{n}.edited" for n in untagged}
    for path in out.glob("*.edited"):
        path.unlink()

    # Changed by a person, also where neither size nor tag tell of it.
    for name in names:
        (out / name).write_bytes(ours[name][:-1] + b"x")
    mine = json.loads(ours["a.geojson"].decode())
    mine["features"] = mine["features"][:1]
    (out / "a.geojson").write_text(json.dumps(mine))
    # The others are damaged by that, which is no correction.
    readable = {"a.geojson", "objects.csv", "objects.parquet", "report.html", "rle.csv"}
    assert predict(*every, "--output.overwrite", "true") == 0
    kept = {path.name.removesuffix(".edited") for path in out.glob("*.edited")}
    assert readable <= kept
    assert json.loads((out / "a.geojson.edited").read_text()) == mine
    assert (out / "objects.csv.edited").read_bytes() == ours["objects.csv"][:-1] + b"x"
    assert (out / "objects.csv").read_bytes() == ours["objects.csv"]


@pytest.mark.parametrize("meanwhile", ["other formats", "damage"])
def test_a_correction_outlives_runs_that_did_not_write_the_file(
    meanwhile: str, predict: Run, tmp_path: Path
) -> None:
    source, path = save(tmp_path / "in" / "a.png"), tmp_path / "out" / "a.geojson"
    assert predict("--output.formats", "labels,geojson") == 0
    mine = json.loads(path.read_text())
    mine["features"] = mine["features"][:1]
    path.write_text(json.dumps(mine))
    if meanwhile == "damage":
        whole = source.read_bytes()
        source.write_bytes(whole[:50])
        assert predict("--output.formats", "labels,geojson") == 1
        source.write_bytes(whole)
    else:
        assert predict("--output.formats", "labels") == 0
    assert predict("--output.formats", "labels,geojson") == 0
    assert json.loads(path.with_name("a.geojson.edited").read_text()) == mine
    assert len(json.loads(path.read_text())["features"]) > 1


@pytest.mark.parametrize("moved", [1, 2])
def test_fault_17_results_of_a_killed_run_are_not_taken_for_a_person_s(
    moved: int, predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "a.png")
    formats = "--output.formats", "labels,geojson"
    assert predict(*formats) == 0
    clean = content(tmp_path / "out")

    def killed(drafts: Drafts, known: object) -> None:
        for name in sorted(drafts.written)[:moved]:
            os.replace(drafts.written[name][0], tmp_path / "out" / name)
        raise KeyboardInterrupt

    for threshold in (0.7, 0.8):
        with monkeypatch.context() as kill:
            kill.setattr(Drafts, "move", killed)
            assert predict(*formats, "--decode.threshold", threshold) == 130
    assert predict(*formats) == 0  # as at first, so the entry of that run seems to tell of it
    assert content(tmp_path / "out") == clean


def test_two_runs_into_one_folder_do_not_spoil_its_journal(tmp_path: Path) -> None:
    def keep(journal: Journal) -> list[tuple[str, Place]]:
        texts = [f"{id(journal)} {number}\n" for number in range(3000)]
        return [(text, journal.keep(text)) for text in texts]

    one, other = Journal(tmp_path), Journal(tmp_path)
    with closing(one.store), closing(other.store):
        with ThreadPoolExecutor(2) as threads:
            kept = [pair for each in threads.map(keep, (one, other)) for pair in each]
        assert [one.store.text(place) for _, place in kept] == [text for text, _ in kept]


def test_tables_of_earlier_formats_do_not_stay_beside_newer_ones(
    predict: Run, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    assert predict("--output.formats", "all") == 0
    with (out / "rle.csv").open("a") as lines:
        lines.write("mine,1 2\n")
    assert predict("--output.formats", "labels") == 0
    left = {path.name for path in out.iterdir() if path.is_file()}
    assert left == {"a_labels.tif", "summary.csv", "run.json", "rle.csv"}


def test_results_of_another_image_are_not_replaced_without_a_word(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = save(tmp_path / "in" / "a.png")
    assert predict() == 0
    first.rename(tmp_path / "elsewhere.png")
    save(tmp_path / "in" / "a.tif", number=4)
    capfd.readouterr()
    assert predict() == 0
    assert "results of other images are replaced: a.png" in capfd.readouterr().err
    # With both, each has a name of its own.
    (tmp_path / "elsewhere.png").rename(first)
    assert predict() == 0
    assert {path.name for path in (tmp_path / "out").glob("*_labels.tif")} == {
        "a.png_labels.tif", "a.tif_labels.tif",
    }  # fmt: skip


def test_fault_8_a_channel_is_picked_by_number_or_name(predict: Run, tmp_path: Path) -> None:
    nuclei = generate(3, size=64)[0][..., 0]
    (tmp_path / "in").mkdir()
    two = np.stack([np.zeros_like(nuclei), nuclei])
    tifffile.imwrite(
        tmp_path / "in" / "two.tif", two, imagej=True,
        metadata={"axes": "CYX", "Labels": ["actin", "Hoechst"]},
    )  # fmt: skip
    found = {}
    for channel in (None, "1", "hoechst", "0", "nothing"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code = predict(*(("--data.channel", channel) if channel else ()))
        (row,) = table(tmp_path / "out" / "summary.csv")
        found[channel] = row["nuclei"]
        assert code == (channel == "nothing"), row
    assert found[None] == found["1"] == found["hoechst"] != "0"
    assert found["0"] == "0"
    assert "--data.channel" in row["message"]
    shutil.rmtree(tmp_path / "out")
    assert predict() == 0
    objects = table(tmp_path / "out" / "objects.csv")
    assert float(objects[0]["mean_Hoechst"]) > float(objects[0]["mean_actin"]) == 0


def test_images_of_different_channels_share_one_table(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    grey = np.asarray(Image.open(tmp_path / "in" / "a.png"))[..., 0]
    Image.fromarray(grey).save(tmp_path / "in" / "b.png")
    assert predict("--output.formats", "table,parquet") == 0
    rows = table(tmp_path / "out" / "objects.csv")
    of = {name: [row for row in rows if row["file"] == name] for name in ("a.png", "b.png")}
    assert [row["mean_red"] for row in of["a.png"]] == [row["mean_0"] for row in of["b.png"]]
    assert (
        {row["mean_0"] for row in of["a.png"]} == {row["mean_red"] for row in of["b.png"]} == {""}
    )
    parquet = pyarrow.parquet.read_table(tmp_path / "out" / "objects.parquet").to_pylist()
    assert parquet[0]["mean_0"] is None
    assert parquet[0]["mean_red"] == float(rows[0]["mean_red"])


def test_images_without_a_pixel_size_do_not_move_the_columns(predict: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = generate(3, size=64)[0][..., 0]
    headers = []
    for pixelless in ("a", "c"):  # before and after the other one
        for old in (tmp_path / "in").iterdir():
            old.unlink()
        Image.fromarray(pixels).save(tmp_path / "in" / f"{pixelless}.png")
        tifffile.imwrite(
            tmp_path / "in" / "b.tif",
            pixels,
            imagej=True,
            resolution=(4, 4),
            metadata={"unit": "um"},
        )
        assert predict("--output.formats", "table", "--output.expand", 2) == 0
        headers.append((tmp_path / "out" / "objects.csv").read_text().splitlines()[0])
        notes = {row["file"]: row["message"] for row in table(tmp_path / "out" / "summary.csv")}
        assert "no pixel size: rings are 2 px wide" in notes[f"{pixelless}.png"]
        assert "rings" not in notes["b.tif"]
    assert headers[0] == headers[1]
    assert "equivalent_diameter_px,area_um2" in headers[0]
    assert headers[0].endswith("confidence,touches_border")


def test_a_pixel_size_sets_units_and_is_kept(predict: Run, tmp_path: Path) -> None:
    pixels = generate(3, size=64)[0][..., 0]
    (tmp_path / "in").mkdir()
    tifffile.imwrite(
        tmp_path / "in" / "a.tif", pixels, imagej=True, resolution=(4, 4), metadata={"unit": "um"}
    )
    assert predict() == 0
    row = table(tmp_path / "out" / "objects.csv")[0]
    assert float(row["area_um2"]) == pytest.approx(int(row["area_px"]) / 16)
    with tifffile.TiffFile(tmp_path / "out" / "a_labels.tif") as tiff:
        assert tiff.pages[0].tags["XResolution"].value == (4, 1)  # type: ignore[union-attr]
        assert tiff.imagej_metadata["unit"] == "um"  # type: ignore[index]
    assert predict("--data.pixel_size", 0.5, "--output.expand", 1) == 0
    row = table(tmp_path / "out" / "objects.csv")[0]
    assert float(row["area_um2"]) == pytest.approx(int(row["area_px"]) / 4)
    assert int(row["ring_area_px"]) > 0


@pytest.mark.parametrize("how", ["imagej", "ome"])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_the_step_of_a_stack_is_kept(dtype: type, how: str, predict: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.stack([generate(3, size=64)[0][..., 0]] * 3)
    tags = {
        "imagej": {
            "imagej": True, "resolution": (4, 4),
            "metadata": {"axes": "ZYX", "unit": "um", "spacing": 1.5},
        },
        "ome": {
            "ome": True,
            "metadata": {
                "axes": "ZYX", "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm",
                "PhysicalSizeY": 250, "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 1.5,
            },
        },
    }[how]  # fmt: skip
    tifffile.imwrite(tmp_path / "in" / "s.tif", pixels, **tags)
    assert predict() == 0
    labels = tmp_path / "out" / "s_labels.tif"
    if dtype == np.uint32:  # as of many nuclei
        formats.write_labels(labels, tifffile.imread(labels).astype(dtype), "Z", 0.25, 1.5)
    kept = read_recording(labels)
    assert (kept.plane_axes, kept.pixel_size, kept.z_step) == ("Z", 0.25, 1.5)


@pytest.mark.parametrize(
    ("shape", "axes", "kind"),
    [
        ((40, 50), "", "imagej"),
        ((3, 40, 50), "Z", "imagej"),
        ((3, 40, 50), "I", "imagej"),
        ((2, 3, 40, 50), "TZ", "imagej"),
        ((2, 3, 40, 50), "PZ", "plain"),
        ((1, 40, 50), "Z", "plain"),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_labels_keep_their_shape_and_open_in_colour(
    shape: tuple[int, ...], axes: str, kind: str, dtype: type, tmp_path: Path
) -> None:
    labels = np.zeros(shape, dtype)
    labels[..., 5:9, 5:9] = 7
    formats.write_labels(tmp_path / "l.tif", labels, axes, 0.25)
    recording = read_recording(tmp_path / "l.tif")
    np.testing.assert_array_equal(recording.pixels.reshape(shape), labels)
    assert recording.pixel_size == pytest.approx(0.25)
    formats.write_labels(tmp_path / "again.tif", labels, axes, 0.25)
    assert (tmp_path / "again.tif").read_bytes() == (tmp_path / "l.tif").read_bytes()
    formats.write_labels(tmp_path / "unknown.tif", labels, axes)
    with tifffile.TiffFile(tmp_path / "unknown.tif") as tiff:
        assert tiff.pages.first.resolutionunit == tifffile.RESUNIT.NONE
    if labels.ndim == 2:
        np.testing.assert_array_equal(read_labels(tmp_path / "l.tif"), labels)
    with tifffile.TiffFile(tmp_path / "l.tif") as tiff:
        np.testing.assert_array_equal(tiff.asarray(), labels)
        assert tiff.asarray().dtype == dtype
        assert tiff.pages.first.software.startswith("cellseg")
        assert tiff.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        assert tiff.is_imagej == (kind == "imagej" and dtype == np.uint16)
        assert tiff.is_ome == (kind == "imagej" and dtype == np.uint32)
        if tiff.is_imagej:
            facts = tiff.imagej_metadata
            assert facts is not None
            assert facts["Ranges"] == (0.0, 7.0)
            table = np.asarray(facts["LUTs"]).reshape(3, 256)
            assert not table[:, 0].any()
            assert (table[:, 1:].max(axis=0) > 100).all()


def test_overlays_of_large_images_are_made_smaller() -> None:
    image = np.zeros((300, 900, 3), np.float32)
    labels = np.zeros((300, 900), np.uint16)
    labels[90:210, 300:600] = 1
    picture = pictures.overlay(image, labels, 300)
    assert picture.shape == (100, 300, 3)
    outline = (picture == pictures.OUTLINE).all(axis=2)
    assert outline[30, 100:200].all()
    assert not outline[31:69, 101:199].any()


def test_a_rerun_does_only_what_is_not_done(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        save(source / f"{number}.png", number)
    (source / "bad.png").write_bytes(b"no image")
    assert predict() == 1
    first = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*_labels.tif")}
    (out / "mine.txt").write_text("foreign")
    (out / "1_overlay.png").unlink()
    os.utime(source / "2.png")  # as a copy has
    capfd.readouterr()
    assert predict() == 1
    assert "2 of 4 images are done already" in capfd.readouterr().err
    assert content(out) == {**first, "mine.txt": b"foreign"}
    again = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {"1_labels.tif"}
    (source / "bad.png").unlink()
    assert predict() == 0
    assert [row["file"] for row in table(out / "summary.csv")] == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("formats", ["labels", "overlay,probs", "labels,rois,geojson,coco"])
def test_a_rerun_without_tables_does_only_what_is_not_done(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], formats: str
) -> None:
    save(tmp_path / "in" / "a.png")
    for _ in range(2):
        assert predict("--output.formats", formats) == 0
    assert "1 of 1 images are done already" in capfd.readouterr().err


def test_nothing_left_to_do_still_gives_the_tables(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict() == 0
    first = content(tmp_path / "out")
    (tmp_path / "out" / "objects.csv").unlink()
    assert predict() == 0
    assert content(tmp_path / "out") == first


def test_fault_35_results_of_other_settings_are_done_again(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    save(tmp_path / "in" / "a.png")
    assert predict("--output.formats", "labels,rois,geojson") == 0
    (out / "a.geojson").write_text("corrected by hand")
    capfd.readouterr()
    assert predict("--output.formats", "labels", "--decode.threshold", 0.9) == 0
    said = capfd.readouterr().err
    assert "decode.threshold" in said
    assert "output.formats" in said
    assert "percentiles" not in said
    # Ours that no longer hold are gone; what someone has changed stays.
    assert set(content(out)) == {"a_labels.tif", "a.geojson"}
    labels = (out / "a_labels.tif").read_bytes()
    shutil.rmtree(out)
    assert predict("--output.formats", "labels", "--decode.threshold", 0.9) == 0
    assert (out / "a_labels.tif").read_bytes() == labels


def test_fault_35_another_image_of_the_same_name_is_done_again(
    predict: Run, tmp_path: Path
) -> None:
    source = save(tmp_path / "in" / "a.png", 3)
    assert predict() == 0
    first = content(tmp_path / "out")
    save(source, 4)
    assert predict() == 0
    changed = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert predict() == 0
    assert content(tmp_path / "out") == changed != first


def test_a_file_that_was_damaged_since_leaves_no_earlier_results(
    predict: Run, tmp_path: Path
) -> None:
    source = save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png", 4)
    assert predict() == 0
    source.write_bytes(b"damaged")
    assert predict() == 1
    assert set(content(tmp_path / "out")) == {"b_labels.tif", "b_overlay.png", "objects.csv"}
    assert {row["file"] for row in table(tmp_path / "out" / "objects.csv")} == {"b.png"}
    save(source)
    assert predict() == 0
    assert [row["status"] for row in table(tmp_path / "out" / "summary.csv")] == ["ok", "ok"]


def test_of_several_journals_the_newest_line_of_a_file_counts(tmp_path: Path) -> None:
    facts = {"stem": "", "size": 1, "mtime": 1, "sha256": "", "outputs": {}}
    first, second = Journal(tmp_path, "1"), Journal(tmp_path, "0")
    first.add_failure("a", {"message": "damaged"}, "s")
    first.add("b", {**facts, "settings": "old"})
    second.add("a", {**facts, "settings": "new"})
    second.add("b", {**facts, "settings": "new"})
    first.add_failure("c", {"message": "damaged"}, "new")
    journal = Journal(tmp_path)
    assert {file: entry.settings for file, entry in journal.entries.items()} == {
        "a": "new", "b": "new",
    }  # fmt: skip
    assert list(journal.failures) == ["c"]
    assert journal.tells_of("c", "new")
    assert not journal.tells_of("c", "old")
    assert not journal.tells_of("b", "old")


def test_a_table_is_put_together_of_the_parts_of_its_images(tmp_path: Path) -> None:
    facts = {"stem": "", "size": 1, "mtime": 1, "sha256": "", "outputs": {}, "settings": ""}
    facts |= {"rows": [ROW]}
    parts = {
        "a": ["file,plane,label,mean_1\na,,1,0.5\n", "file,plane,label,mean_1\na,,2,0.25\n"],
        "b": ["file,plane,label,mean_ü\nb,,1,7\n"],
        "c": [],
    }
    journals = {"a": Journal(tmp_path, "0"), "b": Journal(tmp_path, "1"), "c": Journal(tmp_path)}
    for file, journal in journals.items():
        journal.add(file, {**facts, "objects": [journal.keep(part) for part in parts[file]]})
    write_tables(Journal(tmp_path), ["a", "b", "c"], {"table", "parquet"}, {})
    assert (tmp_path / "objects.csv").read_text(encoding="utf-8") == (
        "file,plane,label,mean_1,mean_ü\na,,1,0.5,\na,,2,0.25,\nb,,1,,7\n"
    )
    assert pyarrow.parquet.read_table(tmp_path / "objects.parquet").to_pydict() == {
        "file": ["a", "a", "b"], "plane": [None] * 3, "label": [1, 2, 1],
        "mean_1": [0.5, 0.25, None], "mean_ü": [None, None, 7],
    }  # fmt: skip


def test_what_is_kept_for_the_tables_does_not_slow_a_rerun_down(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    texts = ["x" * 1_000_000, "Zelle ü \udcff.png\n"]
    places = json.loads(json.dumps([journal.keep(text) for text in texts]))
    assert [journal.store.text(place) for place in places] == texts
    journal.store.close()
    facts = {"size": 1, "mtime": 1, "sha256": "", "outputs": {}, "settings": "", "stem": ""}
    journal.add("a", {**facts, "objects": places})
    assert (tmp_path / ".cellseg" / "journal-0.jsonl").stat().st_size < 1000


def test_fault_17_an_image_whose_part_of_the_tables_is_lost_is_done_again(
    predict: Run, tmp_path: Path
) -> None:
    for number in range(2):
        save(tmp_path / "in" / f"{number}.png", number)
    assert predict() == 0
    clean = content(tmp_path / "out")
    path = tmp_path / "out" / ".cellseg" / "tables-0.txt"
    for rest in (path.read_bytes()[:-10], None):
        path.write_bytes(rest) if rest else path.unlink()
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        assert predict("--output.dir", tmp_path / "copy") == 0
        assert content(tmp_path / "copy") == clean


def test_files_that_are_done_are_opened_only_to_verify_them(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", number)
    assert predict() == 0
    for path in [*(tmp_path / "in").iterdir(), *(tmp_path / "out").glob("*_*")]:
        facts = path.stat()
        path.write_bytes(bytes(facts.st_size))  # it would not be read again
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert predict() == 0
    capfd.readouterr()
    assert predict("--output.verify", "true") == 1
    assert capfd.readouterr().err.count("damaged, done again") == 3
    assert {row["status"] for row in table(tmp_path / "out" / "summary.csv")} == {"error"}


@pytest.mark.parametrize(
    "ending", ["_labels.tif", "_probs.tif", "_overlay.png", "_rois.zip", ".geojson", "_coco.json"]
)
def test_verifying_finds_damage_inside_each_kind_of_file(
    ending: str, predict: Run, tmp_path: Path
) -> None:
    stack(tmp_path / "in" / "s.tif", planes=2)
    assert predict("--output.formats", "all") == 0
    clean = content(tmp_path / "out")
    damaged = tmp_path / "out" / f"s{ending}"
    data = bytearray(damaged.read_bytes())
    middle = 2 * len(data) // 3
    data[middle : middle + 30] = bytes(30)
    damaged.write_bytes(data)
    whole = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("s[._]*")}
    assert predict("--output.formats", "all", "--output.verify", "true") == 0
    assert content(tmp_path / "out") == clean
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("s[._]*")}
    assert again != whole
    assert predict("--output.formats", "all", "--output.verify", "true") == 0
    last = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("s[._]*")}
    assert last == again


def test_drafts_of_killed_processes_are_swept_when_all_is_done(
    predict: Run, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.png")
    for number, age in ((0, 9), (1, -999)):
        table = tmp_path / "out" / f".draft-0123abc{number}.csv"
        labels = tmp_path / "out" / ".cellseg" / f".draft-0123abc{number}.0.tif"
        labels.parent.mkdir(parents=True, exist_ok=True)
        for path in (table, labels):
            path.write_text("half")
            os.utime(path, (time.time() - age,) * 2)
    (tmp_path / "out" / ".draft-mine").write_text("foreign")
    assert predict() == 0
    drafts = {path.name for path in (tmp_path / "out").rglob(".draft-*")}
    assert drafts == {".draft-0123abc1.0.tif", ".draft-0123abc1.csv", ".draft-mine"}


def test_overwrite_starts_over(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict() == 0
    before = (tmp_path / "out" / "a_labels.tif").stat().st_mtime_ns
    assert predict("--output.overwrite", "true") == 0
    assert (tmp_path / "out" / "a_labels.tif").stat().st_mtime_ns > before


def test_fault_17_a_journal_that_was_cut_off_loses_only_its_last_line(
    predict: Run, tmp_path: Path
) -> None:
    for number in range(3):
        save(tmp_path / "in" / f"{number}.png", number)
    assert predict() == 0
    clean = content(tmp_path / "out")
    path = tmp_path / "out" / ".cellseg" / "journal-0.jsonl"
    written = path.read_bytes()
    path.write_bytes(written[: written.index(b'"file": "2.png"') + 100])
    assert sorted(Journal(tmp_path / "out").entries) == ["0.png", "1.png"]
    assert predict() == 0
    again = content(tmp_path / "out")  # of tables with times in them it keeps what was there
    assert {name: again[name] for name in clean} == clean
    assert sorted(Journal(tmp_path / "out").entries) == ["0.png", "1.png", "2.png"]


def test_fault_35_a_table_that_is_open_elsewhere_gets_a_second_name(
    predict: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    save(tmp_path / "in" / "a.png")
    replace = os.replace

    def held(source: Path, target: Path) -> None:
        if Path(target).name == "objects.csv":
            raise PermissionError(13, "held by a spreadsheet")
        replace(source, target)

    with monkeypatch.context() as opened:
        opened.setattr(os, "replace", held)
        for _ in range(2):
            assert predict() == 0
            assert table(tmp_path / "out" / "objects_2.csv")
            assert "objects_2.csv" in capfd.readouterr().err
        (tmp_path / "out" / "objects_2.csv").write_text("of the user")
        assert predict() == 0
        assert (tmp_path / "out" / "objects_2.csv.edited").read_text() == "of the user"
        assert table(tmp_path / "out" / "objects_2.csv")
    second = tmp_path / "out" / "summary_2.csv"
    second.write_text("of the user")
    assert predict("--decode.threshold", 0.6) == 0
    assert not (tmp_path / "out" / "objects_2.csv").exists()  # it would be out of date
    assert second.is_file()


def test_nuclei_at_the_border_are_left_out_on_demand(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    assert predict() == 0
    inside = [r for r in table(tmp_path / "out" / "objects.csv") if r["touches_border"] == "0"]
    assert predict("--decode.exclude_border", "true") == 0
    rows = table(tmp_path / "out" / "objects.csv")
    assert [row["area_px"] for row in rows] == [row["area_px"] for row in inside]
    labels = tifffile.imread(tmp_path / "out" / "a_labels.tif")
    labels[1:-1, 1:-1] = 0
    assert not labels.any()


def test_an_image_that_the_model_is_unsure_of_is_marked(predict: Run, tmp_path: Path) -> None:
    save(tmp_path / "in" / "nuclei.png", size=128)
    noise = gaussian_filter(np.random.default_rng(0).random((128, 128)), 4)
    noise = (noise - noise.min()) / np.ptp(noise)
    Image.fromarray((255 * noise).astype(np.uint8)).save(tmp_path / "in" / "noise.png")
    assert predict("--decode.min_confidence", 0, "--decode.marker", 0.3) == 0
    odd, nuclei = table(tmp_path / "out" / "summary.csv")
    assert float(odd["confidence"]) < 0.8 < 0.9 < float(nuclei["confidence"])
    assert odd["unusual"].startswith("confidence below")
    assert odd["unusual"].endswith("where nuclei are in pieces, give their --data.diameter")
    assert not nuclei["unusual"]


@pytest.mark.parametrize("gain", [1, 3])
def test_saturated_nuclei_are_told(gain: int, predict: Run, tmp_path: Path) -> None:
    grey = np.asarray(Image.fromarray(generate(3, size=128)[0]).convert("L")).astype(int)
    limit = 4095  # of a camera of 12 bits
    dark, bright = (
        np.clip(grey * factor, 0, limit).astype(np.uint16) for factor in (12, 12 * gain)
    )
    (tmp_path / "in").mkdir()
    tifffile.imwrite(
        tmp_path / "in" / "a.tif", np.stack([dark, bright]), imagej=True,
        metadata={"axes": "CYX", "Labels": ["DAPI", "GFP"]},
    )  # fmt: skip
    assert predict() == 0
    (row,) = table(tmp_path / "out" / "summary.csv")
    nuclei = table(tmp_path / "out" / "objects.csv")
    reached = sum(float(each["max_GFP"]) == limit for each in nuclei)
    assert (reached > 3) == (gain > 1)
    said = (
        f"saturated: {reached} of {len(nuclei)} nuclei reach 4095, the highest value of channel GFP"
    )
    assert row["message"] == (said if gain > 1 else "")


def test_results_of_images_that_are_gone_stay_and_are_named(
    predict: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "in" / "b.png", 4)
    assert predict() == 0
    assert "stay" not in capfd.readouterr().err
    (tmp_path / "in" / "b.png").unlink()
    assert predict() == 0
    assert "The results of images that are not in this run stay" in capfd.readouterr().err
    assert (tmp_path / "out" / "b_labels.tif").is_file()
    save(tmp_path / "in" / "b.jpg", 5)  # takes its place
    assert predict() == 0
    assert "The results of other images are replaced: b.png" in capfd.readouterr().err
    assert predict() == 0
    assert not re.search("stay|replaced", capfd.readouterr().err)
    (tmp_path / "in" / "b.jpg").unlink()
    for path in (tmp_path / "out").glob("b_*"):
        path.unlink()
    assert predict() == 0
    assert "stay" not in capfd.readouterr().err
    assert [row["file"] for row in table(tmp_path / "out" / "summary.csv")] == ["a.png"]


def test_results_of_a_file_whose_former_stem_is_taken_stay(predict: Run, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg"):
        save(tmp_path / "in" / name)
        assert predict() == 0
    (tmp_path / "in" / "a.png").unlink()
    assert predict() == 0  # a.jpg is called as a.png once was
    assert (tmp_path / "out" / "a.png_labels.tif").is_file()
    assert (tmp_path / "out" / "a_labels.tif").is_file()


def test_a_maximum_is_of_each_time_and_over_time_it_is_told(predict: Run, tmp_path: Path) -> None:
    pixels = np.stack([generate(number, size=64)[0][..., 0] for number in range(6)])
    (tmp_path / "in").mkdir()
    for name, axes, shape in (
        ("both", "TZYX", (2, 3)),
        ("depth", "ZYX", (6,)),
        ("film", "TYX", (6,)),
    ):
        planes = pixels.reshape(*shape, 64, 64)
        path = tmp_path / "in" / f"{name}.tif"
        tifffile.imwrite(path, planes, imagej=True, metadata={"axes": axes})
    assert predict("--data.plane", "max", "--output.formats", "labels") == 0
    rows = table(tmp_path / "out" / "summary.csv")
    assert [(row["file"], row["plane"]) for row in rows] == [
        ("both.tif", "0"), ("both.tif", "1"), ("depth.tif", ""), ("film.tif", "")
    ]  # fmt: skip
    assert [row["file"] for row in rows if "maximum over time" in row["message"]] == ["film.tif"]
    found = tifffile.imread(tmp_path / "out" / "both_labels.tif")
    # As of a film of the projections.
    flat = pixels.reshape(2, 3, 64, 64).max(1)
    tifffile.imwrite(tmp_path / "in" / "both.tif", flat, imagej=True, metadata={"axes": "TYX"})
    assert predict("--output.formats", "labels") == 0
    np.testing.assert_array_equal(found, tifffile.imread(tmp_path / "out" / "both_labels.tif"))
    assert found.any()


def test_an_image_that_waits_for_its_lane_is_left_when_the_run_is_stopped(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path)
    asked = []
    batch = {"file": "a", "error": ""}
    writer.processes.stop("SIGTERM")
    writer._do(batch, lambda: asked.append(1), Decoding())
    assert not asked


def test_parts_of_a_large_parquet_table_hold_each_nucleus_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CHUNK", 20)
    journal = Journal(tmp_path)
    facts = {"stem": "", "size": 1, "mtime": 1, "sha256": "", "outputs": {}, "settings": ""}
    facts |= {"rows": [ROW]}
    parts = [f"file,plane,label,mean_1\na,,{n},0.5\n" for n in range(1, 10)]
    journal.add("a", {**facts, "objects": [journal.keep(part) for part in parts]})
    write_tables(journal, ["a"], {"parquet"}, {})
    found = pyarrow.parquet.read_table(tmp_path / "objects.parquet")
    assert found["label"].to_pylist() == list(range(1, 10))


def test_the_diameters_of_the_report_are_those_of_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []
    monkeypatch.setattr(
        "cellseg.predict.page.write_page", lambda path, about, rows, diameters, *_: (
            path.write_text("page"), shown.append((rows, diameters.tolist()))
        )
    )  # fmt: skip
    journal = Journal(tmp_path)
    facts = {"stem": "", "size": 1, "mtime": 1, "sha256": "", "outputs": {}, "settings": ""}
    for file, counts in (("a", [0, 2]), ("b", [1, 0, 3])):
        rows = [
            {**ROW, "file": file, "plane": plane, "nuclei": nuclei}
            for plane, nuclei in enumerate((4, 7, 5))
        ]
        place = journal.keep("")
        more = {"rows": rows, "diameters": counts, "thumbnail": place, "overlay": f"{file}.png"}
        journal.add(file, {**facts, **more})
    write_tables(journal, ["a", "b"], {"report"}, {})
    ((rows, diameters),) = shown
    assert diameters == [1, 2, 3]
    # The overlay stands beside the plane with the most nuclei.
    assert [row["plane"] for row in rows if row.get("overlay")] == [1, 1]


def test_labels_written_in_strips_keep_planes_rows_and_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "LABEL_TILE", 16)
    labels = np.random.default_rng(0).integers(0, 99, (3, 40, 56), np.uint32)
    strips = (plane[top : top + 13] for plane in labels for top in range(0, 40, 13))
    formats.write_label_strips(tmp_path / "l.tif", strips, labels.shape, "Z", 0.25, 1.5)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "l.tif"), labels)
    kept = read_recording(tmp_path / "l.tif")
    assert (kept.plane_axes, kept.pixel_size, kept.z_step) == ("Z", 0.25, 1.5)


def test_a_process_whose_clock_is_behind_still_has_the_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"stem": "", "size": 1, "mtime": 1, "sha256": "", "outputs": {}}
    Journal(tmp_path, "1").add("a", {**facts, "settings": "old"})
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    journal = Journal(tmp_path, "0")
    with closing(journal.store):
        journal.add("a", {**facts, "settings": "new"})
    assert Journal(tmp_path).entries["a"].settings == "new"


def test_what_failed_with_other_settings_is_not_done_for_a_shard(
    predict: Run, tmp_path: Path
) -> None:
    for number in range(6):
        save(tmp_path / "in" / f"im{number}.png", number)
    assert predict("--data.channel", 7) == 1
    before = (tmp_path / "out" / "summary.csv").read_bytes()
    assert predict("--data.shard", "0/2") == 0
    assert (tmp_path / "out" / "summary.csv").read_bytes() == before  # the other shard is to end
    assert predict("--data.shard", "1/2") == 0
    rows = table(tmp_path / "out" / "summary.csv")
    assert [row["status"] for row in rows] == ["ok"] * 6
