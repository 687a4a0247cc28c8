"""How wheels are named, split by torch and listed."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

PACKAGING = Path(__file__).parents[2] / "packaging"

FILES = {
    "localattn/__init__.py": "",
    "localattn/lib/liblocalattn.so.0.1": "the core",
    "localattn/lib/localattn_torch-2.4-abi0.so": "for 2.4",
    "localattn/lib/localattn_torch-2.10-abi1.so": "for 2.10",
    "localattn-0.1.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: localattn\nVersion: 0.1.0\n\nName: a text\n",
    "localattn-0.1.0.dist-info/RECORD": "stale\n",
}


@pytest.fixture
def packaging(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(PACKAGING))
    import pairs
    import relabel

    yield {"pairs": pairs, "relabel": relabel}
    for name in ("pairs", "relabel"):
        del sys.modules[name]


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "localattn-0.1.0-py3-none-manylinux_2_28_x86_64.whl"
    with ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def check_record(wheel: Path) -> set[str]:
    """RECORD lists every file with its hash and size. Returns their names."""
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/RECORD"))
        rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(archive.read(name).decode()))}
        assert set(rows) == set(archive.namelist())
        assert rows.pop(name) == ["", ""]
        for file, (digest, size) in rows.items():
            content = archive.read(file)
            assert size == str(len(content))
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        return {*rows, name}


def test_a_wheel_is_relabelled(packaging, wheel: Path) -> None:
    result = packaging["relabel"].relabelled(wheel, "localattn-cu121", "torch2.4")
    assert result.name == "localattn_cu121-0.1.0+torch2.4-py3-none-manylinux_2_28_x86_64.whl"
    info = "localattn_cu121-0.1.0+torch2.4.dist-info"
    names = check_record(result)
    assert names == {name.replace("localattn-0.1.0.dist-info", info) for name in FILES}
    with ZipFile(result) as archive:
        lines = archive.read(f"{info}/METADATA").decode().splitlines()
    assert lines[1:3] == ["Name: localattn-cu121", "Version: 0.1.0+torch2.4"]
    assert lines[-1] == "Name: a text"


@pytest.mark.parametrize(
    ("distribution", "local"), [("natten", ""), ("localattn_cpu", ""), ("localattn-cpu", "torch 2")]
)
def test_other_names_are_refused(packaging, wheel: Path, distribution: str, local: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        packaging["relabel"].relabelled(wheel, distribution, local)


def test_a_wheel_is_split_by_torch_and_listed(packaging, wheel: Path, tmp_path: Path) -> None:
    universal = packaging["relabel"].relabelled(wheel, "localattn-cpu")
    split, site = tmp_path / "split", tmp_path / "site"
    # The tests run without the scripts' directories on sys.path.
    environment = {**os.environ, "PYTHONPATH": str(PACKAGING)}
    subprocess.run([sys.executable, PACKAGING / "split.py", universal, "--into", split], check=True, env=environment)
    wheels = {path.name.split("+")[1].split("-")[0]: path for path in split.iterdir()}
    assert set(wheels) == {"torch2.4", "torch2.10"}
    names = check_record(wheels["torch2.10"])
    assert "localattn/lib/localattn_torch-2.10-abi1.so" in names
    assert "localattn/lib/localattn_torch-2.4-abi0.so" not in names
    assert "localattn/lib/liblocalattn.so.0.1" in names
    listing = [sys.executable, PACKAGING / "index.py", *wheels.values(), universal, "--into", site]
    subprocess.run(listing, check=True)
    page = site / "cpu" / "torch2.10" / "localattn-cpu"
    assert "localattn_cpu-0.1.0%2Btorch2.10-py3" in (page / "index.html").read_text()
    assert page.joinpath(wheels["torch2.10"].name).read_bytes() == wheels["torch2.10"].read_bytes()
    assert {path.parent.name for path in site.glob("cpu/*/index.html")} == {"torch2.4", "torch2.10"}


def test_pairs_are_those_of_the_indexes(packaging, tmp_path: Path) -> None:
    """Where cu121 stopped at torch 2.5, and everything else is younger."""
    for flavour in packaging["pairs"].FLAVOURS:
        versions = ["2.3.1", "2.4.0", "2.4.1", "2.5.1"] if flavour == "cu121" else ["2.13.0", "2.14.0", "2.14.1"]
        files = [f"torch-{version}+{flavour}-cp311-cp311-manylinux_2_28_x86_64.whl" for version in versions]
        files.append("torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl")  # from somewhere else
        folder = tmp_path / flavour / "torch"
        folder.mkdir(parents=True)
        folder.joinpath("index.html").write_text("\n".join(f'<a href="{name}">{name}</a>' for name in files))
    command = [sys.executable, PACKAGING / "pairs.py", "--index", tmp_path.as_uri() + "/{flavour}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    flavours, pairs = (json.loads(line.partition("=")[2]) for line in output.splitlines())
    assert {entry["torch"] for entry in flavours if entry["cuda"] == "cu121"} == {"2.4.1 2.5.1"}
    assert {entry["torch"] for entry in flavours if entry["cuda"] != "cu121"} == {"2.13.0 2.14.1"}
    assert {entry["cuda"] for entry in pairs if entry["machine"] == "aarch64"} == {"cpu"}
    assert len(pairs) == 2 * len(flavours) == 2 * (len(packaging["pairs"].FLAVOURS) + 1)


def test_the_newest_release_of_each_minor_version_counts(packaging) -> None:
    versions = ["2.13.0+cpu", "2.10.1", "2.10.0", "2.9.1rc1", "2.4.0", "2.4.1", "2.3.1", "1.13.1"]
    assert packaging["pairs"].newest(versions) == ["2.4.1", "2.10.1", "2.13.0"]
