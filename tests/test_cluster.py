"""Many processes on one results folder: shards, several devices, several machines, kills."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet
import pytest
import tifffile
from PIL import Image

from cellseg.data.shards import Shard
from cellseg.data.synthetic import generate
from cellseg.predict.journal import Journal
from conftest import cellseg, run_process

# All but these are equal byte for byte however a run came about.
TIMED = {"summary.csv", "run.json", "report.html"}
TWO = ("--config", "ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2")
QUIET = ("--data.num_workers", "0", "--trainer.enable_progress_bar", "false")
# Half a minute each, and seldom another answer than the first process has.
SECOND = pytest.param(1, marks=pytest.mark.slow)
# Nobody hangs: a dead process ends the run within a minute.
MINUTE = 60


def fill(folder: Path, count: int, size: int = 64) -> Path:
    """`count` images of six kinds, in two folders, under names that differ."""
    for number in range(count):
        path = folder / f"plate{number % 2}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < 6:
            Image.fromarray(generate(number, size=size)[0]).save(path)
        else:
            os.link(folder / f"plate{number % 2}" / f"{number % 6:04d}.png", path)
    return folder


def arguments(source: Path, out: Path, *more: object) -> list[str]:
    paths = ("--data.predict_dir", source, "--output.dir", out)
    return [*map(str, ("predict", *paths, *QUIET, *more))]


def predict(source: Path, out: Path, *more: object) -> int:
    return cellseg(*arguments(source, out, *more))


def start(command: list[str], log: Path, *launcher: str, **env: str) -> subprocess.Popen[bytes]:
    """A run of one thread a process, so that sums are taken in one order."""
    with log.open("ab") as lines:
        return subprocess.Popen(
            [*(launcher or (sys.executable, "-m")), "cellseg", *command],
            stdout=lines, stderr=lines,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env},
        )  # fmt: skip


def content(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name not in TIMED and ".cellseg" not in path.parts
    }


def summary(out: Path) -> list[dict[str, str]]:
    with (out / "summary.csv").open(newline="") as lines:
        return [{**row, "seconds": ""} for row in csv.DictReader(lines)]


def tables(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.is_file()}


def finished(out: Path) -> list[Path]:
    """The label images that are there under their names."""
    return [path for path in out.rglob("*_labels.tif") if ".cellseg" not in path.parts]


def wait_for(out: Path, count: int) -> None:
    """Until so many label images are there."""
    deadline = time.monotonic() + 120
    while len(finished(out)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, check=False)
    return [int(number) for number in listed.stdout.split()]


def ends(process: int) -> bool:
    """Whether a process that is not our child ends within a minute."""
    deadline = time.monotonic() + MINUTE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def times_done(out: Path) -> Counter[str]:
    """How often each file was done, over all journals."""
    counts: Counter[str] = Counter()
    for path in (out / ".cellseg").glob("journal-*.jsonl"):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError):  # cut off where the disk was full
                counts.update(name for key, name in json.loads(line).items() if key == "file")
    return counts


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("images"), 200)


@pytest.fixture(scope="module")
def clean(images: Path) -> Path:
    """What one undisturbed process makes of the images."""
    out = images.with_name("clean")
    assert start(arguments(images, out), images.with_name("clean.log")).wait(240) == 0
    return out


def test_a_shard_depends_on_the_name_alone() -> None:
    names = [f"plate/{number}.tif" for number in range(1000)]
    shards = [Shard.parse(f"{index}/8") for index in range(8)]
    assert [sum(name in shard for shard in shards) for name in names] == [1] * 1000
    assert min(sum(name in shard for name in names) for shard in shards) > 90
    # The first 16 digits of `printf %s NAME | sha256sum`.
    for name, digits in (("a/b.png", 0x88F7EC7982E1B5DB), ("Zelle ü.png", 0xE32BC99BD1AA5310)):
        assert [index for index, shard in enumerate(shards) if name in shard] == [digits % 8]


@pytest.mark.parametrize("value", ["8/8", "1", "/", "-1/2", "a/b", "1/2/3", "0/0"])
def test_a_shard_that_is_none_is_refused(
    value: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    line = fails("predict", "--data.predict_dir", tmp_path, f"--data.shard={value}")
    assert f"--data.shard {value}: must be I/N" in line


def test_shards_do_their_files_and_the_last_one_writes_the_tables_of_all(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 9), tmp_path / "out"
    (source / "bad.png").write_bytes(b"no image")
    formats = ("--output.formats", "labels,table,parquet,rle,report")
    assert predict(source, tmp_path / "one", *formats) == 1
    codes = []
    for index in range(3):
        assert not out.exists() or not tables(out)
        codes.append(predict(source, out, *formats, "--data.shard", f"{index}/3"))
    assert codes == [int("bad.png" in Shard(index, 3)) for index in range(3)]
    assert content(out) == content(tmp_path / "one")
    assert summary(out) == summary(tmp_path / "one")
    assert tables(out) == tables(tmp_path / "one")
    assert set(times_done(out).values()) == {1}
    assert json.loads((out / "run.json").read_text())["images"] == 10
    # The last run may be one without a shard, and be repeated.
    for _ in range(2):
        for name in tables(out):
            (out / name).unlink()
        assert predict(source, out, *formats) == 1
        assert content(out) == content(tmp_path / "one")
        assert summary(out) == summary(tmp_path / "one")
    assert set(times_done(out).values()) == {1}


def test_a_shard_that_is_stopped_says_what_is_left(images: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(arguments(images, out, "--data.shard", "0/2"), log)
    wait_for(out, 5)
    run.terminate()
    assert run.wait(MINUTE) == 143
    names = [path.relative_to(images).as_posix() for path in images.rglob("*.png")]
    mine = sum(name in Shard(0, 2) for name in names)
    left = mine - len(finished(out))
    assert 0 < left < mine
    assert f"{left} of {mine} images are left" in log.read_text()
    assert not (out / "summary.csv").exists()  # that is for the last shard to write


def test_an_empty_shard_is_no_error(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 1)
    empty = next(i for i in range(50) if "plate0/0000.png" not in Shard(i, 50))
    assert predict(source, tmp_path / "out", "--data.shard", f"{empty}/50") == 0
    assert not list(tmp_path.rglob("*_labels.tif"))
    assert not (tmp_path / "out" / "summary.csv").exists()


@pytest.mark.slow
def test_fault_28_shards_that_run_and_end_at_the_same_time(
    images: Path, clean: Path, tmp_path: Path
) -> None:
    runs = [
        start(arguments(images, tmp_path / "out", "--data.shard", f"{i}/3"), tmp_path / f"log{i}")
        for i in range(3)
    ]
    assert [run.wait(240) for run in runs] == [0, 0, 0]
    assert content(tmp_path / "out") == content(clean)
    assert summary(tmp_path / "out") == summary(clean)
    assert set(times_done(tmp_path / "out").values()) == {1}
    names = sorted(path.name for path in (tmp_path / "out" / ".cellseg").glob("*.jsonl"))
    assert names == [f"journal-{i}of3-0.jsonl" for i in range(3)]


def test_the_cluster_config_makes_few_files(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 5), tmp_path / "out"
    for index in range(2):
        config = ("--config", "cluster.yaml", "--data.shard", f"{index}/2")
        assert predict(source, out, *config) == 0
    assert tables(out) == {"objects.parquet", "summary.csv", "run.json"}
    assert len([path for path in out.rglob("*") if path.is_file()]) == 5 + 3 + 2 * 2
    table = pyarrow.parquet.read_table(out / "objects.parquet").to_pydict()
    found = Counter(table["file"])
    for row in summary(out):
        assert found[row["file"]] == int(row["nuclei"])


def test_results_depend_on_neither_companions_nor_order(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 6)
    assert predict(source, tmp_path / "all") == 0
    together = content(tmp_path / "all")
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
    for place, name in enumerate(names):
        turned = tmp_path / "turned" / f"{len(names) - place}.png"
        turned.parent.mkdir(exist_ok=True)
        shutil.copy(source / name, turned)
        assert predict(source / name, tmp_path / f"alone{place}") == 0
    assert predict(turned.parent, tmp_path / "turned_out") == 0
    for place, name in enumerate(names):
        expected = together[name.replace(".png", "_labels.tif")]
        stem = Path(name).stem
        assert (tmp_path / f"alone{place}" / f"{stem}_labels.tif").read_bytes() == expected
        other = tmp_path / "turned_out" / f"{len(names) - place}_labels.tif"
        assert other.read_bytes() == expected


@pytest.mark.parametrize("victim", [0, SECOND])
def test_fault_17_a_killed_process_ends_the_run_and_the_next_one_does_the_rest(
    victim: int, images: Path, clean: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(arguments(images, out, *TWO), log)
    wait_for(out, 10)
    (other,) = children(run.pid)
    os.kill((run.pid, other)[victim], signal.SIGKILL)
    assert run.wait(MINUTE) != 0
    assert ends(other)
    assert "died" in log.read_text() or victim == 1  # then Lightning may have been faster
    for path in finished(out):
        assert tifffile.imread(path).shape == (64, 64)
    before = {path: path.stat().st_mtime_ns for path in finished(out)}
    assert 10 <= len(before) < 200
    assert start(arguments(images, out, *TWO), log).wait(240) == 0
    assert content(out) == content(clean)
    assert summary(out) == summary(clean)
    again = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert len(again) <= 2  # those at hand, whose line was not yet written


@pytest.mark.parametrize("target", [0, SECOND])
def test_fault_19_sigterm_to_any_of_two_processes_stops_both(
    target: int, images: Path, clean: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = start(arguments(images, out, *TWO), log)
    wait_for(out, 10)
    (other,) = children(run.pid)
    os.kill((run.pid, other)[target], signal.SIGTERM)
    assert run.wait(MINUTE) == 143
    rows = summary(out)
    assert 10 <= len(rows) < 200
    assert len(finished(out)) == len(rows)
    assert start(arguments(images, out, *TWO), log).wait(240) == 0
    assert content(out) == content(clean)
    assert set(times_done(out).values()) == {1}


@pytest.mark.slow
def test_fault_16_one_of_two_processes_cannot_write(tmp_path: Path) -> None:
    source, out = fill(tmp_path / "in", 40), tmp_path / "out"
    out.mkdir()
    (out / "plate1").write_text("in the way")
    done = run_process(*arguments(source, out, *TWO))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("cellseg: error")]
    assert len(lines) == 1
    assert str(out / "plate1") in lines[0]
    assert "Traceback" not in done.stderr
    assert (out / "plate1").read_text() == "in the way"


@pytest.mark.slow
def test_fault_1_two_processes_say_once_that_there_is_nothing_to_predict(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = run_process(*arguments(tmp_path / "in", tmp_path / "out", *TWO))
    assert done.returncode == 2
    assert done.stderr.count("no image found") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "victim", [*(pytest.param(each, marks=pytest.mark.slow) for each in (None, 0)), SECOND]
)
def test_tasks_of_slurm_notice_a_death_by_themselves(
    victim: int | None, images: Path, clean: Path, tmp_path: Path
) -> None:
    # As srun starts them; it may leave the others alone when one dies.
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "cells", "SLURM_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    out, log = tmp_path / "out", tmp_path / "log"
    tasks = [
        start(
            arguments(images, out, *TWO), log, **job,
            SLURM_NODEID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    if victim is None:
        assert [task.wait(240) for task in tasks] == [0, 0]
        assert content(out) == content(clean)
        return
    wait_for(out, 10)
    tasks[victim].kill()
    assert tasks[1 - victim].wait(MINUTE) == 1
    tasks[victim].wait()
    assert "a process of this run has died" in log.read_text()
    assert 10 <= len(finished(out)) < 200


@pytest.mark.slow
def test_torchrun_starts_the_processes_and_notices_a_death(
    images: Path, clean: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    torchrun += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m")
    run = start(arguments(images, out, *TWO), log, *torchrun)
    wait_for(out, 10)
    workers = children(run.pid)
    os.kill(workers[-1], signal.SIGKILL)
    assert run.wait(MINUTE) != 0
    assert all(map(ends, workers))
    assert start(arguments(images, out, *TWO), log, *torchrun).wait(240) == 0
    assert content(out) == content(clean)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, ...]]]:
    """Two network namespaces joined by a cable: what starts a process in each."""
    names = [f"cellseg{os.getpid()}{side}" for side in "ab"]
    script = f"""
        set -e
        ip netns add {names[0]}; ip netns add {names[1]}
        ip link add cs0 netns {names[0]} type veth peer name cs0 netns {names[1]}
        ip -n {names[0]} addr add 10.231.0.1/24 dev cs0
        ip -n {names[1]} addr add 10.231.0.2/24 dev cs0
        for n in {names[0]} {names[1]}; do ip -n $n link set lo up; ip -n $n link set cs0 up; done
    """
    made = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    try:
        if made.returncode:
            pytest.skip(f"no network namespaces: {made.stderr.strip()}")
        yield [("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cs0") for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("ip"), reason="needs iproute2")
@pytest.mark.parametrize("victim", [None, 0, 1])
def test_two_machines_on_a_shared_folder(
    victim: int | None, hosts: list[tuple[str, ...]], images: Path, clean: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def begin() -> list[subprocess.Popen[bytes]]:
        return [
            start(
                arguments(images, out, *TWO, "--trainer.devices", 1, "--trainer.num_nodes", 2),
                tmp_path / f"log{place}",
                *(*host, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.231.0.1:29500"),
                *("--rdzv-conf", f"is_host={1 - place}", "--local-addr", f"10.231.0.{place + 1}"),
                "-m",
            )
            for place, host in enumerate(hosts)
        ]

    runs = begin()
    if victim is not None:
        wait_for(out, 10)
        (worker,) = children(runs[victim].pid)
        os.kill(worker, signal.SIGKILL)
        assert all(run.wait(MINUTE) != 0 for run in runs)
        assert len(finished(out)) < 200
        runs = begin()
    assert [run.wait(240) for run in runs] == [0, 0]
    assert content(out) == content(clean)
    assert summary(out) == summary(clean)


@pytest.mark.slow
def test_two_images_at_a_time_leave_what_one_after_the_other_does(
    images: Path, clean: Path, tmp_path: Path
) -> None:
    run = start(arguments(images, tmp_path / "out"), tmp_path / "log", OMP_NUM_THREADS="2")
    assert run.wait(240) == 0
    assert content(tmp_path / "out") == content(clean)
    assert summary(tmp_path / "out") == summary(clean)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fault_17_ten_kills_leave_what_one_clean_run_makes(
    images: Path, clean: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    moments = random.Random(0)
    for kill in range(10):
        run = start(arguments(images, out), log, OMP_NUM_THREADS="2")
        # From before the first image to the last ones, wherever that is on this machine.
        wait_for(out, min(190, len(finished(out)) + moments.randrange(19)))
        time.sleep(moments.random() * 0.2)
        run.kill()
        assert run.wait() == -signal.SIGKILL, kill
        for path in finished(out):
            assert tifffile.imread(path).shape == (64, 64)
    assert start(arguments(images, out), log, OMP_NUM_THREADS="2").wait(240) == 0
    assert content(out) == content(clean)  # pixels and tags; objects.csv; and no draft is left
    assert summary(out) == summary(clean)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no small disk: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "devices", [pytest.param((), id="one"), pytest.param(TWO, marks=pytest.mark.slow, id="two")]
)
def test_fault_16_a_full_disk(
    devices: tuple[str, ...], images: Path, small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    done = run_process(*arguments(images, out, *devices))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"cellseg: error: {out}")
    assert "No space left" in last
    assert "Traceback" not in done.stderr
    assert finished(out)
    for path in finished(out):
        assert tifffile.imread(path).shape == (64, 64)
    assert not list(out.rglob(".draft-*"))
    # What is told to be done is: elsewhere the rest is.
    shutil.copytree(out, tmp_path / "out")
    told = len(Journal(tmp_path / "out").entries)
    assert told > 10
    again = run_process(*arguments(images, tmp_path / "out"))
    assert again.returncode == 0
    assert f"{told} of 200 images are done already" in again.stderr
    assert set(times_done(tmp_path / "out").values()) == {1}


def test_granted_cores_are_used_and_no_others(tmp_path: Path) -> None:
    code = (
        "import torch; from cellseg.cli import main; from cellseg.cores import cores\n"
        f"assert main(['predict', '--data.predict_dir', {str(tmp_path / 'none')!r}]) == 2\n"
        "print(cores(), torch.get_num_threads())"
    )
    # A task of two cores in a machine of more, or of a mask of one.
    bare = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    mask = sorted(os.sched_getaffinity(0))
    for granted, allowed, expected in (("1", mask, 1), ("64", mask[:1], 1)):
        slurm = {"SLURM_CPUS_PER_TASK": granted}
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, allowed)), sys.executable, "-c", code],
            capture_output=True, text=True, check=True, env={**bare, **slurm},
        )  # fmt: skip
        assert done.stdout.split() == [str(expected)] * 2
