from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]
PINNED = {
    line.split("==")[0].lower(): line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line and not line.startswith("#")
}


def test_releases_of_lightning_that_stole_credentials_are_excluded() -> None:
    (lightning,) = (r for r in REQUIREMENTS if r.name == "lightning")
    assert not any(lightning.specifier.contains(bad) for bad in ("2.6.2", "2.6.3", "2.6.5"))


def test_constraints_satisfy_every_requirement_and_name_no_local_version() -> None:
    for requirement in REQUIREMENTS:
        assert requirement.specifier.contains(PINNED[requirement.name.lower()]), requirement
    assert not any("+" in version for version in PINNED.values())


def test_nothing_is_installed_whose_licence_or_build_does_not_fit() -> None:
    # Copyleft, paid or non-commercial; and torchvision, which does not import beside every torch.
    unfit = {"fastremap", "edt", "connected-components-3d", "albumentationsx", "cellpose"}
    assert not {*unfit, "torchvision", "timm", "segmentation-models-pytorch"} & PINNED.keys()


@pytest.mark.slow
def test_wheel_works_elsewhere_with_its_configs_and_split(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"cellseg/configs/{config.name}" in names
    for name in ("nuclei-1.safetensors", "nuclei-1.json", "nuclei-1.md"):
        assert f"cellseg/weights/{name}" in names
    assert wheel.stat().st_size < 16e6
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import cellseg; print(cellseg.__file__)\n"
        "from cellseg.data.groups import dsb2018; print(len(dsb2018()))\n"
        "from cellseg.cli import main; main(['fit', '--config', 'nuclei.yaml', '--print_config'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert str(tmp_path) in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[1] == "664"
    assert "base_channels: 16" in done.stdout
