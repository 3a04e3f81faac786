from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from skimage.segmentation import find_boundaries

from cellseg import __version__
from cellseg.data.about import About
from cellseg.data.datamodule import NucleiDataModule
from cellseg.data.synthetic import generate
from cellseg.predict import formats, pictures, results, writer
from cellseg.predict.lanes import Lanes
from cellseg.predict.results import write_results
from conftest import SHARED, SMALL, cellseg, find_checkpoint

Predict = Callable[..., tuple[int, Path]]

OF_THE_RUN = {
    "summary.csv", "objects.csv", "report.html", "run.json",
    ".cellseg/journal-0.jsonl", ".cellseg/tables-0.txt",
}  # fmt: skip


@pytest.fixture
def predict(trained: Path, tmp_path: Path) -> Predict:
    """Predicts a folder with the small model: the exit code, and where the results are."""

    def run(source: Path, *more: object, out: str = "out") -> tuple[int, Path]:
        model = ("--ckpt_path", find_checkpoint(trained), "--data.num_workers", 0)
        paths = ("--data.predict_dir", source, "--output.dir", tmp_path / out)
        return cellseg("predict", *model, *paths, *more), tmp_path / out

    return run


def save(path: Path, size: int = 48, number: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generate(number, size=64)[0][:size, :size]).save(path)
    return path


def summary(out: Path) -> dict[str, dict[str, str]]:
    with (out / "summary.csv").open(newline="") as lines:
        return {row["file"]: row for row in csv.DictReader(lines)}


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_fault_15_a_name_that_is_no_unicode_is_an_error_row(
    predict: Predict, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.png")
    try:
        shutil.copy(tmp_path / "in" / "a.png", os.fsencode(tmp_path / "in") + b"/b\xff.png")
    except OSError:
        pytest.skip("the file system takes no such name")
    code, out = predict(tmp_path / "in", "--output.formats", "all")
    assert code == 1
    rows = summary(out)
    assert rows["a.png"]["status"] == "ok"
    assert rows["b\\udcff.png"]["status"] == "error"
    assert "rename it" in rows["b\\udcff.png"]["message"]


def test_results_mirror_the_tree_and_the_summary_tells_what_they_hold(
    predict: Predict, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    save(source / "a.png")
    save(source / "deep er" / "Zelle ü.PNG", size=40)
    code, out = predict(source)
    assert code == 0
    stems = ("a", "deep er/Zelle ü")
    pictures = {f"{stem}_{kind}" for stem in stems for kind in ("labels.tif", "overlay.png")}
    assert tree(out) == {*pictures, *OF_THE_RUN}
    rows = summary(out)
    assert list(rows) == ["a.png", "deep er/Zelle ü.PNG"]
    for stem, row in zip(stems, rows.values(), strict=True):
        labels = tifffile.imread(out / f"{stem}_labels.tif")
        assert labels.dtype == np.uint16
        assert labels.shape == (int(row["height"]), int(row["width"]))
        areas = np.unique(labels[labels > 0], return_counts=True)[1]
        assert int(row["nuclei"]) == len(areas) == labels.max()
        if len(areas):
            assert float(row["median_area_px"]) == np.median(areas)
        assert row["status"] == "ok"
        assert float(row["seconds"]) > 0


def test_run_json_says_what_made_the_results(
    predict: Predict, trained: Path, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.png")
    _, out = predict(tmp_path / "in")
    run = json.loads((out / "run.json").read_text())
    assert run["version"] == __version__
    assert run["model_sha256"] == sha256(find_checkpoint(trained).read_bytes()).hexdigest()
    assert run["settings"]["model"]["base_channels"] == 4
    assert (run["images"], run["errors"]) == (1, 0)


def test_overlay_is_the_image_with_outlines_of_the_nuclei(tmp_path: Path) -> None:
    image = np.full((30, 30, 3), 0.25, np.float32)
    labels = np.zeros((30, 30), np.uint16)
    labels[5:15, 5:15] = 1
    pictures.write_overlay(tmp_path / "o.png", pictures.overlay(image, labels, 2048))
    shown = np.asarray(Image.open(tmp_path / "o.png"))
    outline = (shown == pictures.OUTLINE).all(axis=2)
    ring = labels > 0
    ring[6:14, 6:14] = False
    np.testing.assert_array_equal(outline, ring)
    np.testing.assert_array_equal(shown[~outline], 64)


def test_labels_are_uint32_beyond_uint16(tmp_path: Path) -> None:
    labels = np.arange(1, 70_001, dtype=np.uint32).reshape(280, 250)
    formats.write_labels(tmp_path / "l.tif", labels)
    read = tifffile.imread(tmp_path / "l.tif")
    assert read.dtype == np.uint32
    np.testing.assert_array_equal(read, labels)


def test_equal_stems_keep_their_full_names(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "A.tif", "b.ome.tif"):
        save(source / name)
    code, out = predict(source)
    assert code == 0
    stems = {name.removesuffix("_labels.tif") for name in tree(out) if name.endswith("labels.tif")}
    assert stems == {"a.png", "A.tif", "b.ome"}


def test_one_file_a_list_and_patterns(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "b.png", "sub/c.png", "sub/d.tif"):
        save(source / name)
    assert list(summary(predict(source / "b.png", out="one")[1])) == ["b.png"]
    listed = tmp_path / "list.txt"
    listed.write_text(f"in/a.png\n{source / 'sub' / 'c.png'}\nin/none.png\n")
    code, out = predict(listed, out="listed")
    assert code == 1
    rows = summary(out)
    assert list(rows) == ["a.png", "none.png", "sub/c.png"]
    assert rows["none.png"]["status"] == "error"
    patterns = ("--data.include", "*.png,*.tif", "--data.exclude", "sub/c*,b.png")
    assert list(summary(predict(source, *patterns, out="some")[1])) == ["a.png", "sub/d.tif"]


def test_results_go_beside_the_input_by_default(trained: Path, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    model = ("--ckpt_path", find_checkpoint(trained), "--data.num_workers", 0)
    assert cellseg("predict", *model, "--data.predict_dir", tmp_path / "in") == 0
    assert "a_labels.tif" in tree(tmp_path / "in_cellseg")


def test_fault_1_nothing_to_predict(
    tmp_path: Path, trained: Path, fails: Callable[..., str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.md").write_text("no image")
    args = ("predict", "--ckpt_path", find_checkpoint(trained), "--output.dir", tmp_path / "out")
    assert ".png" in fails(*args, "--data.predict_dir", tmp_path / "in")
    assert "no such" in fails(*args, "--data.predict_dir", tmp_path / "none")
    assert "--data.predict_dir" in fails(*args)
    assert not (tmp_path / "out").exists()


def test_fault_2_bad_files_among_good_ones(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    good = save(source / "good.png")
    (source / "zero.png").touch()
    (source / "half.png").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (source / "fake.tif").write_text("I am no image")
    code, out = predict(source)
    assert code == 1
    rows = summary(out)
    status = {name: row["status"] for name, row in rows.items()}
    bad = dict.fromkeys(("zero.png", "half.png", "fake.tif"), "error")
    assert status == {"good.png": "ok", **bad}
    for name in bad:
        assert rows[name]["message"].startswith(name)
        assert "\n" not in rows[name]["message"]
    assert tree(out) == {"good_labels.tif", "good_overlay.png", *OF_THE_RUN}


def test_fault_2_what_is_no_file_is_an_error_row_with_its_cause(
    predict: Predict, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    save(source / "a.png")
    os.mkfifo(source / "pipe.png")  # reading would wait for a writer
    (source / "gone.png").symlink_to(tmp_path / "nothing.png")
    (source / "plain").mkdir()
    (tmp_path / "list.txt").write_text("in/a.png\nin/pipe.png\nin/gone.png\nin/plain\n")
    code, out = predict(tmp_path / "list.txt")
    assert code == 1
    said = {name: row["message"] for name, row in summary(out).items()}
    assert said.pop("a.png") == ""
    assert said == {
        "pipe.png": "pipe.png: neither a file nor a folder; leave it out",
        "gone.png": "gone.png: cannot be read: No such file or directory",
        "plain": "plain: a folder, but no zarr image; name the images in it",
    }


def test_fault_3_foreign_litter_and_own_outputs(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(source / "a.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db"):
        (source / name).write_bytes(b"litter")
    code, out = predict(source, out="in/results")
    assert code == 0
    first = tree(out)
    # Again: into the same folder, and into another one with the first one's results in view.
    assert predict(source, out="in/results")[0] == 0
    assert tree(out) == first
    assert list(summary(predict(source, out="elsewhere")[1])) == ["a.png"]


def test_fault_3_what_is_named_as_a_result_of_an_image_beside_it_is_none(
    predict: Predict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    names = ("a.png", "b_labels.tif", "c.tif", "c_overlay.png", "c_OVERLAY.png")
    for name in names:
        save(source / name)
    assert predict(source, out="in")[0] == 0
    assert "beside them: c_overlay.png\n" in capfd.readouterr().err
    mine = np.eye(64, dtype=np.uint16)
    tifffile.imwrite(source / "a_labels.tif", mine)  # corrected, so without our tag
    code, out = predict(source, "--output.overwrite", "true", out="in")
    assert code == 0
    assert "beside them: a_labels.tif\n" in capfd.readouterr().err
    assert set(summary(out)) == {"a.png", "b_labels.tif", "c.tif", "c_OVERLAY.png"}
    np.testing.assert_array_equal(tifffile.imread(source / "a_labels.tif.edited"), mine)
    kept = source / "c_overlay.png.edited"
    np.testing.assert_array_equal(Image.open(kept), Image.open(source / "c_OVERLAY.png"))


def test_names_at_the_limit_of_the_file_system(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    long, longer = "a" * 243, "b" * 244
    for name in (long, longer, "c"):
        save(source / f"{name}.png")
    code, out = predict(source)
    assert code == 1
    rows = summary(out)
    assert [row["status"] for row in rows.values()] == ["ok", "error", "ok"]
    assert f"{longer}_overlay.png: too long" in rows[f"{longer}.png"]["message"]
    assert (out / f"{long}_overlay.png").is_file()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (17, 33), (100, 160)])
def test_fault_11_odd_sizes(shape: tuple[int, int], predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    code, out = predict(tmp_path / "in")
    assert code == 0
    assert tifffile.imread(out / "a_labels.tif").shape == shape


def test_fault_13_black_constant_and_hot_pixel_are_written(
    predict: Predict, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    hot = np.zeros((64, 64), np.uint8)
    hot[20, 30] = 255
    for name, pixels in (("black", hot * 0), ("constant", hot * 0 + 77), ("hot", hot)):
        Image.fromarray(pixels).save(source / f"{name}.png")
    code, out = predict(source)
    assert code == 0
    rows = summary(out)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["black.png"]["nuclei"] == rows["constant.png"]["nuclei"] == "0"
    for name in ("black", "constant", "hot"):
        assert tifffile.imread(out / f"{name}_labels.tif").shape == (64, 64)
        assert (out / f"{name}_overlay.png").is_file()


def test_fault_14_nan_pixels_are_said_and_do_no_harm(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clean = generate(1, size=64)[0][..., 0].astype(np.float32)
    for name, bad in (("clean", 0), ("nan", 7)):
        pixels = clean.copy()
        pixels.ravel()[:bad] = [np.nan, np.inf, -np.inf, *[np.nan] * 4][:bad]
        tifffile.imwrite(tmp_path / "in" / f"{name}.tif", pixels)
    code, out = predict(tmp_path / "in")
    assert code == 0
    rows = summary(out)
    assert rows["clean.tif"]["message"] == ""
    assert "7 NaN" in rows["nan.tif"]["message"]
    for line in (out / "objects.csv").read_text().splitlines()[1:]:
        assert all(np.isfinite(float(value)) for value in line.split(",")[2:])


def test_fault_15_links_are_followed_once(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(source / "real" / "a.png")
    save(tmp_path / "far" / "b.png")
    (source / "link").symlink_to(tmp_path / "far")
    (source / "real" / "loop").symlink_to(source)
    code, out = predict(source)
    assert code == 0
    assert list(summary(out)) == ["link/b.png", "real/a.png"]


def test_fault_16_output_that_cannot_be_written_is_named(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    (tmp_path / "file").write_text("in the way")
    args = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "file")
    assert cellseg("predict", "--ckpt_path", find_checkpoint(trained), *args) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("cellseg: error: ")
    assert str(tmp_path / "file") in last


def test_fault_16_a_full_disk_leaves_the_earlier_results_and_no_draft(
    predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "in" / "a.png")
    _, out = predict(tmp_path / "in")
    earlier = {path.name: path.read_bytes() for path in out.glob("a_*")}

    def full(name: Path, *args: object) -> None:
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(results, "write_overlay", full)  # the labels are written by then
        assert predict(tmp_path / "in", "--decode.threshold", "0.7")[0] == 1
    assert {path.name: path.read_bytes() for path in out.glob("a_*")} == earlier
    assert not list(out.rglob(".draft-*"))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_fault_19_predict_is_stopped_after_the_image_at_hand(
    name: str, code: int, trained: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    save(source / "0000.png", size=64)
    for number in range(1, 3000):
        os.link(source / "0000.png", source / f"{number:04d}.png")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cellseg", "predict", "--data.predict_dir", str(source)),
            *("--ckpt_path", str(find_checkpoint(trained)), "--output.dir", str(out)),
            *("--data.num_workers", "1", "--trainer.enable_progress_bar", "false"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*_labels.tif")) and time.monotonic() < deadline:
        time.sleep(0.1)
    # As schedulers and terminals do, the loader's process too.
    os.killpg(process.pid, signal.Signals[name])
    _, said = process.communicate(timeout=30)
    assert process.returncode == code, said
    done = summary(out)
    assert 0 < len(done) < 3000
    assert f"{3000 - len(done):,} of 3,000 images are left" in said
    assert json.loads((out / "run.json").read_text())["left"] == 3000 - len(done)
    assert (
        f"images are left: the run was stopped</dt><dd>{3000 - len(done):,}"
        in (out / "report.html").read_text()
    )
    assert "Traceback" not in said
    assert {row["status"] for row in done.values()} == {"ok"}
    assert len(tree(out)) == 2 * len(done) + len(OF_THE_RUN)


def test_fault_30_a_killed_loader_process_is_one_line(trained: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save(source / "0000.png", size=64)
    for number in range(1, 3000):
        os.link(source / "0000.png", source / f"{number:04d}.png")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cellseg", "predict", "--data.predict_dir", str(source)),
            *("--ckpt_path", str(find_checkpoint(trained)), "--output.dir", str(out)),
            *("--data.num_workers", "1", "--trainer.enable_progress_bar", "false"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*_labels.tif")) and time.monotonic() < deadline:
        time.sleep(0.1)
    listed = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    for worker in listed.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "cellseg: error: a process that reads images was killed" in said


@pytest.mark.parametrize("command", ["predict", pytest.param("fit", marks=pytest.mark.slow)])
def test_fault_30_full_shared_memory_is_one_line(
    command: str, nuclei: Path, trained: Path, tmp_path: Path
) -> None:
    save(tmp_path / "in" / "a.png", size=64)
    where: dict[str, list[object]] = {
        "predict": [
            *("--ckpt_path", find_checkpoint(trained), "--data.predict_dir", tmp_path / "in"),
            *("--output.dir", tmp_path / "out", "--predict.runtime", "torch"),
        ],
        "fit": ["--data.root", nuclei, "--trainer.default_root_dir", tmp_path, *SMALL],
    }
    args = [*where[command], "--data.num_workers", 1]
    done = subprocess.run(
        [sys.executable, "-m", "cellseg", command, *map(str, args)],
        # Where no file may be larger, a tensor to send cannot be either.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "cellseg: error: a process that reads images was killed" in done.stderr
    assert "--data.num_workers 0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("listens", [True, False])
def test_fault_30_an_image_of_a_killed_loader_process_cannot_be_fetched(
    predict: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    listens: bool,
) -> None:
    save(tmp_path / "in" / "0.png")
    address = str(tmp_path / "socket")  # where torch would ask the process for a shared tensor

    def fetch(self: NucleiDataModule, stage: str) -> None:
        with socket.socket(socket.AF_UNIX) as server:
            if listens:
                server.bind(address)
                server.listen()
                threading.Thread(target=lambda: server.accept()[0].close()).start()
            Client(address, authkey=b"")

    monkeypatch.setattr(NucleiDataModule, "setup", fetch)
    assert predict(tmp_path / "in")[0] == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("cellseg: error: a process that reads images was killed")
    assert not any(line.startswith("Traceback") for line in lines)


@pytest.mark.slow
def test_results_do_not_pile_up_in_memory(trained: Path, tmp_path: Path) -> None:
    # Were predictions kept, 40 more images of 0.5 MB would add some 40 MB (float32 maps more).
    code = (
        "import resource, sys\n"
        "from cellseg.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "sys.exit(code)\n"
    )
    peaks = []
    for count in (4, 44):
        source = tmp_path / f"in{count}"
        source.mkdir()
        image = Image.fromarray(np.tile(generate(2)[0], (2, 2, 1)))
        for number in range(count):
            image.save(source / f"{number}.png")
        done = subprocess.run(
            [
                *(sys.executable, "-c", code, "predict", "--data.predict_dir", source),
                *("--ckpt_path", find_checkpoint(trained), "--output.dir", tmp_path / f"o{count}"),
                *("--data.num_workers", "0", "--trainer.enable_progress_bar", "false"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 20, peaks


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real files of ../shared")
def test_real_files_of_laboratories(predict: Predict, tmp_path: Path) -> None:
    source = SHARED / "data" / "formats"
    code, out = predict(source, "--data.diameter", "none")
    assert code == 0
    rows = summary(out)
    assert len(rows) == 12
    assert "took blue" in rows["instanseg_fluorescence_multich.tif"]["message"]
    sizes = {name: (row["height"], row["width"]) for name, row in rows.items()}
    assert sizes["test_image_SYX.ome.tif"] == ("513", "639")
    assert sizes["kidney_48_5_rgb.tif"] == ("901", "1493")


def test_a_read_only_input_folder_is_no_hindrance(predict: Predict, tmp_path: Path) -> None:
    source = tmp_path / "in"
    save(source / "a.png")
    source.chmod(0o555)
    try:
        assert predict(source)[0] == 0
    finally:
        source.chmod(0o755)
    shutil.rmtree(source)


def test_fault_32_more_nuclei_than_16_bits_count(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cellseg.task import SegmentationTask

    dots = torch.zeros(1, 2, 520, 520)
    dots[:, 0, ::2, ::2] = 1  # 67,600 nuclei of one pixel
    monkeypatch.setattr(SegmentationTask, "probs", lambda self, image: dots)
    Image.fromarray(np.eye(520, dtype=np.uint8) * 200).save(tmp_path / "many.png")
    args = ("--ckpt_path", find_checkpoint(trained), "--data.predict_dir", tmp_path / "many.png")
    out = ("--output.dir", tmp_path / "out", "--decode.min_area", 0, "--data.num_workers", 0)
    out += ("--data.diameter", "none")
    assert cellseg("predict", *args, *out) == 0
    labels = tifffile.imread(tmp_path / "out" / "many_labels.tif")
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(np.unique(labels), np.arange(67_601))
    (row,) = csv.DictReader((tmp_path / "out" / "summary.csv").read_text().splitlines())
    assert row["nuclei"] == "67600"
    assert len((tmp_path / "out" / "objects.csv").read_text().splitlines()) == 67_601


def test_as_beside_a_gpu_the_results_are_those_of_a_cpu(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, size in enumerate((48, 48, 64, 48, 64, 48, 48)):
        save(tmp_path / "in" / f"{number}.png", size, number)
    (tmp_path / "in" / "half.png").write_bytes(b"\x89PNG")
    stack = np.stack([generate(number, size=48)[0][..., 0] for number in range(3)])
    tifffile.imwrite(tmp_path / "in" / "stack.tif", stack, photometric="minisblack")
    data = ("--data.predict_dir", tmp_path / "in", "--output.formats", "all")
    run = ("predict", *data, "--ckpt_path", find_checkpoint(trained), "--predict.runtime", "torch")
    assert cellseg(*run, "--output.dir", tmp_path / "cpu") == 1
    beside_gpu = torch.device("meta")  # the network stays where it is: only the lanes are others
    monkeypatch.setattr(writer, "Lanes", lambda images, _: Lanes(images, beside_gpu))
    assert cellseg(*run, "--output.dir", tmp_path / "gpu") == 1
    assert tree(tmp_path / "gpu") == tree(tmp_path / "cpu")
    for name in tree(tmp_path / "cpu"):
        there, here = tmp_path / "gpu" / name, tmp_path / "cpu" / name
        if name.endswith("_probs.tif"):  # some CPUs sum a batch in another order than an image
            probs = tifffile.imread(there).astype(int), tifffile.imread(here).astype(int)
            np.testing.assert_allclose(*probs, rtol=0, atol=1)
        elif name.endswith((".tif", ".png", ".csv")) and name != "summary.csv":
            assert there.read_bytes() == here.read_bytes()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed"])
def test_fault_26_intensities_are_measured_as_recorded_whatever_the_precision_of_the_network(
    precision: str, tmp_path: Path
) -> None:
    pixels = generate(3, size=96)[0][..., 0] * np.float32(1.001) + 1000
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    paths = ("--data.predict_dir", tmp_path / "a.tif", "--output.dir", tmp_path / "out")
    assert cellseg("predict", *paths, "--trainer.precision", precision) == 0
    labels = tifffile.imread(tmp_path / "out" / "a_labels.tif")
    with (tmp_path / "out" / "objects.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert rows
    for row in rows:
        inside = pixels[labels == int(row["label"])]
        assert float(row["mean_0"]) == pytest.approx(inside.mean(), rel=1e-6)


def test_outlines_are_the_inner_boundaries_of_scikit_image() -> None:
    rng = np.random.default_rng(0)
    for shape in ((40, 50), (1, 7), (7, 1), (1, 1)):
        labels = rng.integers(0, 4, shape).repeat(3, axis=0).astype(np.uint16)
        expected = find_boundaries(labels, mode="inner")
        np.testing.assert_array_equal(pictures.inner_boundaries(labels), expected)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ValueError("odd"), RuntimeError("no memory"), OSError("connection lost")],
)
def test_one_file_that_fails_in_its_middle_is_an_error_row(
    error: Exception, predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "in" / name)

    def fail_once(about: About, *more: Any) -> Any:
        if about.file == "a.png":
            raise error
        return write_results(about, *more)

    monkeypatch.setattr(writer, "write_results", fail_once)
    code, out = predict(tmp_path / "in")
    assert code == 1
    rows = summary(out)
    assert rows["b.png"]["status"] == "ok"
    assert rows["a.png"]["status"] == "error"
    assert rows["a.png"]["message"] == (str(error) or "MemoryError")


def test_masks_of_images_are_no_images(
    predict: Predict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for name in ("a.png", "b_masks.png", "k/images/k.png", "n/images/1.png", "masks/x.png"):
        save(source / name)  # no image is beside the second and the last
    (source / "slide.NDPI").touch()
    for name in ("a_masks.tif", "a_labels.png", "k/masks/0.png", "k/masks/1.png", "n/labels/1.png"):
        save(source / name)
    _, out = predict(source, "--output.formats", "labels")
    assert sorted(summary(out)) == [
        "a.png", "b_masks.png", "k/images/k.png", "masks/x.png", "n/images/1.png"
    ]  # fmt: skip
    said = capfd.readouterr().err
    assert "5 left out as results or masks of images beside them: " in said
    assert "1 left out, of kinds that are not read: slide.NDPI" in said


def test_a_folder_goes_before_links_to_it(predict: Predict, tmp_path: Path) -> None:
    save(tmp_path / "in" / "raw" / "a.png")
    save(tmp_path / "other" / "b.png")
    (tmp_path / "in" / "latest").symlink_to("raw")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "other")
    assert sorted(summary(predict(tmp_path / "in")[1])) == ["more/b.png", "raw/a.png"]


def test_a_list_may_have_quotes_and_comments(predict: Predict, tmp_path: Path) -> None:
    save(tmp_path / "a b.png")
    save(tmp_path / "c.png")
    (tmp_path / "list.txt").write_text(f'# mine\n"{tmp_path}/a b.png"\n\nc.png\n')
    assert sorted(summary(predict(tmp_path / "list.txt")[1])) == ["a b.png", "c.png"]


def test_results_of_another_folder_are_told_and_never_taken_for_these(
    predict: Predict, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(("one", "two")):
        pixels = generate(number + 3, size=64)[0]
        (tmp_path / folder).mkdir()
        tifffile.imwrite(tmp_path / folder / "i.tif", pixels)  # of one size
        os.utime(tmp_path / folder / "i.tif", (1e9, 1e9))  # and time
    for folder in ("one", "two"):
        capfd.readouterr()
        assert predict(tmp_path / folder, "--output.formats", "labels")[0] == 0
        said = capfd.readouterr().err
        assert ("holds results of images of" in said) == (folder == "two")
        assert "done already" not in said
    (tmp_path / "one").rename(tmp_path / "moved")
    (tmp_path / "two").rename(tmp_path / "here")
    predict(tmp_path / "here", "--output.formats", "labels")
    said = capfd.readouterr().err
    assert "holds results of images of" not in said
    assert "1 of 1 images are done already" in said
