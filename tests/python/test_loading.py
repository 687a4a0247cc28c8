"""Which binding is loaded, and what is said where none is: each case in a process of its own, over an installation made
for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import localattn
from localattn import _distribution, _library

MINOR = _library.TORCH_MINOR
BINDING = f"localattn_torch-{MINOR}-abi{_library.CXX11_ABI}.so"
# A distribution of another name would be a conflict with the one that is installed here.
NAME = _distribution.installed()[0].name if _distribution.installed() else "localattn"

CALL = """
    x = torch.randn(1, 6, 5, 2, 8)
    try:
        error = (localattn.local_attention(x, x, x, 3) - localattn.reference.local_attention(x, x, x, 3)).abs().max()
        print("difference", float(error))
    except RuntimeError as error:
        print("refused:", error)
"""


class Result(NamedTuple):
    output: str
    warnings: str


class Installation:
    """A folder with the package, its library and a distribution's metadata, and no binding yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "localattn"
        installed = _library.library_directory()
        shutil.copytree(Path(localattn.__file__).parent, self.package, ignore=shutil.ignore_patterns("lib", "include"))
        shutil.copytree(installed.parent / "include", self.package / "include")
        self.lib = self.package / "lib"
        self.lib.mkdir()
        for library in installed.glob("liblocalattn.so.*"):
            self.lib.joinpath(library.name).symlink_to(library)

    def add_distribution(self, name: str = NAME, version: str = "0.1.0") -> None:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def add_binding(self, name: str = BINDING) -> None:
        shutil.copy(_library.library_directory() / BINDING, self.lib / name)

    def run(self, code: str = CALL, torch_version: str = torch.__version__, **environment: str) -> Result:
        """In a Python whose torch calls itself `torch_version`."""
        program = f"import torch\ntorch.__version__ = {torch_version!r}\nimport localattn\n{textwrap.dedent(code)}"
        path = os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **environment}, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Result(done.stdout, done.stderr)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "site")


def test_the_binding_for_this_torch_is_chosen(installation: Installation) -> None:
    installation.add_distribution()
    installation.add_binding()
    installation.lib.joinpath("localattn_torch-2.1-abi0.so").write_text("not this one")
    installation.lib.joinpath("localattn_torch-99.0-abi1.so").write_text("nor this")
    result = installation.run(CALL + "\n    print(localattn._library.loaded.how)")
    assert float(re.findall(r"^difference (\S+)$", result.output, re.MULTILINE)[0]) < 1e-5
    assert BINDING in result.output
    assert "RuntimeWarning" not in result.warnings


def test_a_torch_older_than_every_binding(installation: Installation) -> None:
    installation.add_distribution()
    installation.add_binding()
    output = installation.run(torch_version="1.99.3").output
    assert f"was built for torch {MINOR}" in output
    assert re.search(r"but torch 1\.99\.3( \(old C\+\+ ABI\))? is running", output)
    assert "pip install 'torch>=2.4'" in output


@pytest.mark.parametrize(
    ("version", "command"),
    [
        ("0.1.0+torch2.99", "pip install --force-reinstall --no-deps localattn-cpu==0.1.0"),
        ("0.1.0", "pip install --upgrade --no-deps localattn-cpu"),
    ],
    ids=["wheel for one torch", "wheel for several"],
)
def test_a_wheel_without_this_torch(installation: Installation, version: str, command: str) -> None:
    installation.add_distribution("localattn-cpu", version)
    installation.lib.joinpath("localattn_torch-2.99-abi1.so").write_text("")
    output = installation.run().output
    assert re.search(r"refused: localattn-cpu \S+( and .*)? in .* was built for torch 2\.99, but torch 2\.", output)
    assert f"To mend it: {command}" in output


def test_the_other_cxx_abi(installation: Installation) -> None:
    installation.add_distribution()
    other = 1 - _library.CXX11_ABI
    installation.lib.joinpath(f"localattn_torch-{MINOR}-abi{other}.so").write_text("")
    output = installation.run().output
    built, running = (" (old C++ ABI)" if abi == 0 else "" for abi in (other, _library.CXX11_ABI))
    assert f"was built for torch {MINOR}{built}, but torch {torch.__version__}{running} is running" in output


def test_a_binding_that_does_not_load(installation: Installation) -> None:
    installation.add_distribution()
    installation.lib.joinpath(BINDING).write_bytes(b"\x7fELF, but nothing more")
    output = installation.run().output
    assert str(installation.lib / BINDING) in output
    assert f"does not load with torch {torch.__version__}" in output
    assert re.search("file too short|invalid ELF header", output)  # the loader's own words
    assert "To mend it: pip install --force-reinstall --no-deps" in output


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    monkeypatch.setattr(_distribution, "installed", lambda: ())
    error = _library._load().error
    assert f"native library is not installed; looked in {tmp_path / 'lib'}" in error
    assert "pip install --no-build-isolation" in error


def test_a_newer_torch_works_through_the_c_api(installation: Installation) -> None:
    installation.add_distribution()
    installation.add_binding()
    result = installation.run(CALL + "\n    print(localattn._library.loaded.how)", torch_version="99.0.1")
    assert float(re.findall(r"^difference (\S+)$", result.output, re.MULTILINE)[0]) < 1e-5
    assert (
        f"the C API, because torch 99.0.1 is newer than the bindings here, the newest for torch {MINOR}"
        in result.output
    )
    assert "RuntimeWarning: localattn: torch 99.0.1 is newer" in result.warnings


def test_an_unknown_forced_binding(installation: Installation) -> None:
    installation.add_binding()
    assert 'LOCALATTN_BINDING is "nonsense"' in installation.run(LOCALATTN_BINDING="nonsense").output


def test_two_flavours_are_noticed(installation: Installation) -> None:
    installation.add_distribution("localattn-cpu")
    installation.add_distribution("localattn-cu121", "0.0.9")
    installation.add_binding()
    result = installation.run()
    assert "difference" in result.output
    for told in ("localattn-cpu 0.1.0", "localattn-cu121 0.0.9", "pip uninstall -y localattn-cpu localattn-cu121"):
        assert told in result.warnings
    shutil.rmtree(installation.lib)
    installation.lib.mkdir()
    installation.lib.joinpath("liblocalattn.so.0.1").write_text("")
    assert "Besides: localattn-cpu 0.1.0 and localattn-cu121 0.0.9" in installation.run().output


def test_a_source_build_beside_a_wheel_is_noticed(installation: Installation) -> None:
    installation.add_distribution("localattn")
    installation.add_distribution("localattn-cpu")
    installation.add_binding()
    warnings = installation.run().warnings
    assert re.search(r"localattn 0\.1\.0 and localattn-cpu 0\.1\.0( and .*)? are installed at once", warnings)


def test_info_tells_all_of_it(installation: Installation) -> None:
    installation.add_distribution()
    installation.add_binding()
    command = [sys.executable, "-m", "localattn", "info"]
    path = os.pathsep.join([str(installation.folder), os.environ.get("PYTHONPATH", "")])
    text = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=installation.folder,
        env={**os.environ, "PYTHONPATH": path},
    ).stdout  # fmt: skip
    for fact in (
        rf"distribution +{NAME} 0\.1\.0", rf"bindings +torch {MINOR}", rf"operators +through {BINDING}",
        "CUDA kernels +", r"C\+\+ ABI +(new|old)", "driver +", "device", "C library +glibc", "avx2 +|portable +",
    ):  # fmt: skip
        assert re.search(f"^  {fact}", text, re.MULTILINE), fact


@pytest.mark.parametrize(
    ("capability", "told"),
    [
        ((8, 0), "machine code of sm_80"),
        ((8, 7), "machine code of sm_86"),
        ((9, 0), "machine code of sm_90"),
        ((12, 0), "PTX of compute_90"),
        ((7, 0), "too old: the kernels are for 7.5"),
    ],
)
def test_info_compares_a_gpu_with_the_code_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], told: str
) -> None:
    from localattn import _info

    monkeypatch.setattr(_library, "build_info", lambda: "GNU 12; CUDA 13.0.1, compute capabilities 75, 80, 86, 90")
    assert told in _info._code_for(*capability)


def test_info_tells_a_driver_from_a_library_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from localattn import _info

    mathematics = ctypes.CDLL("libm.so.6")
    monkeypatch.setattr(_info.ctypes, "CDLL", lambda name: mathematics)
    assert re.search("^none: .*cuDriverGetVersion", _info._driver())
