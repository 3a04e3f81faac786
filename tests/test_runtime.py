from __future__ import annotations

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

import cellseg as package
from cellseg import runtime
from cellseg.checkpoint import read, resolve
from cellseg.data.dataset import CropDataset
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.nn.int8 import measure, quantised
from cellseg.nn.unet import UNet
from cellseg.quantise import main as quantise
from cellseg.release import release
from cellseg.runtime import choose, compile_network
from conftest import cellseg, find_checkpoint, write_nuclei

pytest.importorskip("openvino", reason="the extra openvino is not installed")


def mask_of_process() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def network() -> UNet:
    """As after training: batch normalisation does something."""
    torch.manual_seed(0)
    net = UNet(out_channels=2, base_channels=4, depth=2)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                torch.nn.init.normal_(value)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def test_openvino_computes_what_torch_does(tmp_path: Path) -> None:
    net = network()
    backend = compile_network(net, tmp_path)
    for shape in ((1, 3, 32, 48), (1, 3, 17, 33), (2, 3, 1, 5)):
        image = torch.rand(shape).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            torch.testing.assert_close(net(image, backend), net(image), rtol=1e-4, atol=1e-5)


def test_a_converted_network_is_kept_and_belongs_to_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, image = network(), torch.rand(1, 3, 8, 8)
    before = compile_network(net, tmp_path)(image)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_convert", lambda net, folder: pytest.fail("converted again"))
        torch.testing.assert_close(compile_network(net, tmp_path)(image), before)
    with torch.no_grad():
        net.head.bias += 1
    torch.testing.assert_close(compile_network(net, tmp_path)(image), before + 1)
    # Others who share the cache can read it.
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "openvino").iterdir()}
    assert modes == {0o777 & ~mask_of_process()}


@pytest.mark.slow
def test_a_network_that_cannot_be_kept_is_converted_for_the_moment(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    net, image = network(), torch.rand(1, 3, 8, 8)
    expected = compile_network(net, tmp_path / "cache")(image)
    torch.testing.assert_close(compile_network(net, tmp_path / "file")(image), expected)


def test_the_command_finds_the_same_nuclei_with_both(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture = generate(1, size=200)[0]
    Image.fromarray(picture).save(tmp_path / "in" / "a.png")
    labels = {}
    for name in ("openvino", "torch"):
        paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / name)
        flags = ("--predict.runtime", name, "--data.cache_dir", tmp_path / "cache")
        assert cellseg("predict", "--data.num_workers", 0, *paths, *flags) == 0
        assert json.loads((tmp_path / name / "run.json").read_text())["runtime"] == name
        with (tmp_path / name / "summary.csv").open() as table:
            assert [row["runtime"] for row in csv.DictReader(table)] == [name]
        labels[name] = tifffile.imread(tmp_path / name / "a_labels.tif")
    assert labels["torch"].max() > 3
    np.testing.assert_array_equal(labels["torch"], labels["openvino"])
    for name in ("openvino", "torch"):
        np.testing.assert_array_equal(package.load(runtime=name).predict(picture), labels["torch"])


def test_int8_computes_nearly_what_torch_does(tmp_path: Path) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.rand(4, 3, 64, 64)
    rounded = quantised(net, measure(net, images.split(1)))
    backend = compile_network(rounded, tmp_path)
    for image in (images[:1], torch.rand(1, 3, 33, 70)):
        with torch.inference_mode():
            expected, simulated = net(image), rounded(image)
            actual = net(image, backend)
        assert 0 < (actual - expected).abs().mean() < 0.05 * expected.std()
        assert (actual - simulated).abs().mean() < 0.05 * expected.std()
    torch.testing.assert_close(net.state_dict(), before)


def test_two_products_of_int8_fit_into_16_bits() -> None:
    net = network()
    rounded = quantised(net, measure(net, [torch.rand(2, 3, 64, 64)]))
    layers = [m for m in rounded.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for layer in layers:
        (rounding,) = layer.parametrizations.weight  # type: ignore[union-attr]
        steps = layer.weight.transpose(0, rounding.axis).flatten(1) / rounding.scale[:, None]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert 2 * 255 * steps.abs().max() < 2**15


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere OpenVINO has other kernels"
)
def test_int8_computes_every_convolution_with_whole_numbers(tmp_path: Path) -> None:
    import openvino

    net = network()
    compile_network(quantised(net, measure(net, [torch.rand(2, 3, 64, 64)])), tmp_path)
    (path,) = tmp_path.rglob("net.xml")
    graph = openvino.Core().compile_model(path, "CPU").get_runtime_model()
    found = [op.get_rt_info() for op in graph.get_ops()]
    kinds = [
        (str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str)))
        for info in found
    ]
    convolutions = [number for kind, number in kinds if "convolution" in kind.lower()]
    assert len(convolutions) == 5 * 2 + 2 + 1
    assert set(convolutions) <= {"i8", "u8"}


def test_ranges_are_means_over_images_of_the_extremes_in_each() -> None:
    net = network()
    images, seen = torch.rand(3, 3, 16, 16), []
    handle = net.contracting[0][2].register_forward_hook(lambda m, args, out: seen.append(out))
    ranges = measure(net, [images[:2], images[2:]])
    handle.remove()
    each = torch.cat(seen).flatten(1)
    expected = [each.amin(1).mean().item(), each.amax(1).mean().item()]
    assert ranges["contracting.0.2"] == pytest.approx(expected)
    assert len(ranges) == 5 * 2 + 2


def test_a_layer_that_gives_nothing_but_0_can_be_quantised() -> None:
    net = network()
    torch.nn.init.zeros_(net.up[0].weight)
    torch.nn.init.zeros_(net.up[0].bias)
    image = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert quantised(net, measure(net, [image]))(image).isfinite().all()


def test_the_model_of_the_package_can_be_computed_in_int8() -> None:
    # After a new release of weights: python -m cellseg.quantise nuclei-1 --data.root DIR
    assert read(resolve("nuclei-1")).ranges


def test_int8_is_measured_once_by_a_command_and_not_mixed_with_others(
    trained: Path, nuclei: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    model = shutil.copy(find_checkpoint(trained, "best"), tmp_path / "best.ckpt")
    (tmp_path / "in").mkdir()
    Image.fromarray(generate(1, size=64)[0]).save(tmp_path / "in" / "a.png")
    paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
    command = ("predict", "--ckpt_path", model, *paths, "--data.num_workers", 0)
    line = fails(*command, "--predict.runtime", "int8")
    assert "python -m cellseg.quantise MODEL" in line
    assert not (tmp_path / "out").exists()

    before = torch.load(model, weights_only=True)
    data = ("--data.root", str(nuclei), "--data.crop_size", "32", "--data.num_workers", "0")
    assert quantise([str(model), *data]) == 0
    after = torch.load(model, weights_only=True)
    assert after.keys() - before.keys() == {"ranges"}
    torch.testing.assert_close(after["state_dict"], before["state_dict"])
    release(model, tmp_path / "mine.safetensors", {})
    assert read(tmp_path / "mine.safetensors").ranges == after["ranges"]

    tables = {}
    for name in ("openvino", "int8", "int8"):
        assert cellseg(*command, "--predict.runtime", name) == 0
        assert json.loads((tmp_path / "out" / "run.json").read_text())["runtime"] == name
        (table,) = (tmp_path / "out").glob("*_labels.tif")
        done = table.stat().st_mtime_ns
        assert (done == tables.get(name)) == (name in tables)  # the same is not done again
        tables[name] = done
    assert tables["openvino"] != tables["int8"]
    package.load(str(model), runtime="int8").predict(generate(1, size=64)[0])


def test_quantise_measures_a_released_model_on_the_images_it_was_trained_on(
    trained: Path, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "mine.safetensors"
    release(find_checkpoint(trained, "best"), model, {})
    seen: set[str] = set()
    draw = CropDataset.__getitem__

    def watch(self: CropDataset, number: int) -> dict[str, Any]:
        item = draw(self, number)
        seen.add(item["id"])
        return item

    monkeypatch.setattr(CropDataset, "__getitem__", watch)
    more = tmp_path / "more"  # images that the model does not know
    shutil.copytree(nuclei, more)
    write_nuclei(more, 8, start=50)
    flags = ("--data.crop_size", "32", "--data.num_workers", "0", "--data.split_seed", "5")
    assert quantise([str(model), "--data.root", str(more), *flags]) == 0
    stored = read(model)
    assert stored.split is not None and seen == set(stored.split["train"].values())
    assert stored.ranges and all(low < high for low, high in stored.ranges.values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nuclei-9", "--data.root", "x"], "nuclei-9: no such file"),
        (["nuclei-1"], "name annotated images with --data.root"),
        (["nuclei-1", "--data.rot", "x"], "data.rot"),
        ([], "model"),
        (["nuclei-1", "--data.root", ""], "--data.root: the value is empty"),
    ],
)
def test_quantise_answers_a_mistake_with_one_line(
    args: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert quantise(args) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("cellseg: error: ") and message in line


def test_auto_takes_openvino_only_where_it_computes_the_same() -> None:
    assert choose("auto", single_precision_on_cpu=True) == "openvino"
    assert choose("auto", single_precision_on_cpu=False) == "torch"
    assert choose("torch", single_precision_on_cpu=True) == "torch"
    assert choose("auto", single_precision_on_cpu=True, ranges={"up.0": [0, 1]}) == "openvino"
    for name in ("openvino", "int8"):
        with pytest.raises(InputError, match=f"{name} .* single precision"):
            choose(name, single_precision_on_cpu=False)


def test_without_openvino_auto_is_torch_and_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert choose("auto", single_precision_on_cpu=True) == "torch"
    for name in ("openvino", "int8"):
        with pytest.raises(InputError, match="pip install openvino"):
            choose(name, single_precision_on_cpu=True)


def test_half_precision_is_left_to_torch(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(generate(1, size=64)[0]).save(tmp_path / "in" / "a.png")
    paths = ("--data.predict_dir", tmp_path / "in", "--output.dir", tmp_path / "out")
    flags = ("--data.num_workers", 0, "--trainer.precision", "bf16-mixed")
    assert cellseg("predict", *paths, *flags) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["runtime"] == "torch"
    assert cellseg("predict", *paths, *flags, "--predict.runtime", "openvino") == 2


def test_openvino_opens_no_socket(tmp_path: Path) -> None:
    code = """
import socket, sys
from pathlib import Path
class Refused(socket.socket):
    def __init__(self, *args, **kwargs):
        raise SystemExit("a socket was opened")
socket.socket = Refused
from cellseg.nn.int8 import measure, quantised
from cellseg.nn.unet import UNet
from cellseg.runtime import compile_network
compile_network(UNet(base_channels=2, depth=1).eval(), Path(sys.argv[1]))
assert sys.modules["openvino_telemetry"] is None
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.slow
def test_a_model_may_go_in_any_thread(tmp_path: Path) -> None:
    code = f"""
import gc, os, signal, threading
from pathlib import Path
import torch
from cellseg.nn.unet import UNet
from cellseg.runtime import compile_network

def use_and_forget():
    net = UNet(out_channels=1, base_channels=4, depth=2).eval()
    return compile_network(net, Path({str(tmp_path)!r}))

heard = []
signal.signal(signal.SIGUSR1, lambda *args: heard.append(1))
held = [use_and_forget()]
held[0](torch.rand(1, 3, 16, 16))
other = threading.Thread(target=lambda: (held.clear(), gc.collect()))
other.start()
other.join()
for _ in range(20):
    os.kill(os.getpid(), signal.SIGUSR1)
print(len(heard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


@pytest.mark.slow
def test_a_loader_process_leaves_an_inherited_network_alone(tmp_path: Path) -> None:
    script = """
import gc, os, sys, time
from pathlib import Path
import torch
from cellseg.nn.unet import UNet
from cellseg.runtime import compile_network

gc.disable()
backend = compile_network(UNet(base_channels=4, depth=2).eval(), Path(sys.argv[1]))
with torch.inference_mode():
    backend(torch.rand(1, 3, 32, 32))
ring = [backend]  # garbage that only the collector finds, as a trainer and its callbacks are
ring.append(ring)
del ring, backend
child = os.fork()
if not child:
    gc.collect()
    os._exit(0)
for _ in range(100):
    if os.waitpid(child, os.WNOHANG)[0]:
        sys.exit(0)
    time.sleep(0.1)
os.kill(child, 9)
sys.exit("the child waits for ever")
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=120)


def test_a_network_that_finds_the_disk_full_is_converted_for_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    save = openvino.save_model

    def full(model: Any, path: Path, **how: Any) -> None:
        if tmp_path in path.parents:
            raise RuntimeError("basic_ios::clear: iostream error")  # as it then says
        save(model, path, **how)

    monkeypatch.setattr(openvino, "save_model", full)
    net, image = network(), torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(compile_network(net, tmp_path)(image), net(image))
    assert not [*(tmp_path / "openvino").iterdir()]


@pytest.mark.slow
def test_two_threads_that_compute_first_do_not_wait_for_each_other(tmp_path: Path) -> None:
    code = """
import sys
from threading import Barrier, Thread
from cellseg.runtime import _openvino
openvino = _openvino()
sys.setswitchinterval(1e-6)
both = Barrier(2)
def first():
    both.wait()
    openvino.Type.f32.to_dtype()  # as each inference does
threads = [Thread(target=first) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        assert [run.wait(120) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
