from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import cellseg as package
from cellseg import runtime
from cellseg.data.synthetic import generate
from cellseg.errors import InputError
from cellseg.nn.unet import UNet
from cellseg.runtime import choose, compile_levels
from conftest import cellseg

pytest.importorskip("openvino", reason="the extra openvino is not installed")


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
    levels = compile_levels(net, tmp_path)
    for shape in ((1, 3, 32, 48), (1, 3, 17, 33), (2, 3, 1, 5)):
        image = torch.rand(shape).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            torch.testing.assert_close(net(image, levels), net(image), rtol=1e-4, atol=1e-5)


def test_a_converted_network_is_kept_and_belongs_to_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, image = network(), torch.rand(1, 3, 8, 8)
    before = compile_levels(net, tmp_path)(image)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_convert", lambda net, folder: pytest.fail("converted again"))
        torch.testing.assert_close(compile_levels(net, tmp_path)(image), before)
    with torch.no_grad():
        net.head.bias += 1
    torch.testing.assert_close(compile_levels(net, tmp_path)(image), before + 1)


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


def test_auto_takes_openvino_only_where_it_computes_the_same() -> None:
    assert choose("auto", single_precision_on_cpu=True) == "openvino"
    assert choose("auto", single_precision_on_cpu=False) == "torch"
    assert choose("torch", single_precision_on_cpu=True) == "torch"
    with pytest.raises(InputError, match="single precision"):
        choose("openvino", single_precision_on_cpu=False)


def test_without_openvino_auto_is_torch_and_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    assert choose("auto", single_precision_on_cpu=True) == "torch"
    with pytest.raises(InputError, match=r"cellseg\[openvino\]"):
        choose("openvino", single_precision_on_cpu=True)


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
from cellseg.nn.unet import UNet
from cellseg.runtime import compile_levels
compile_levels(UNet(base_channels=2, depth=1).eval(), Path(sys.argv[1]))
assert sys.modules["openvino_telemetry"] is None
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
