"""The binding's CUDA side without a GPU: test_cuda.py on emulated kernels, and what a CUDA tensor gets where CUDA is
missing. The package is copied, and a library of emulated kernels put beside its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import localattn

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "dev"
# An editable install would find its own package first.
PYTEST = """
import sys, pytest
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory) -> Path:
    """A library that gives torch devices of type "cuda" in plain memory."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch has a GPU's device of its own")
    if not shutil.which("ninja"):
        pytest.skip("ninja, which torch builds extensions with, was not found")
    folder = tmp_path_factory.mktemp("device")
    cpp_extension.load(
        "torch_device", [str(ROOT / "tests/cuda/torch_device.cpp")], extra_cflags=["-O0"],
        extra_ldflags=["-Wl,-soname,libc10_cuda.so"], build_directory=str(folder), is_python_module=False,
        with_cuda=False,
    )  # fmt: skip
    return folder / "torch_device.so"


@pytest.fixture(scope="module")
def kernels() -> Path:
    """liblocalattn_cuda.so with the kernels compiled for the host."""
    if not shutil.which("cmake"):
        pytest.skip("cmake was not found")
    for command in (["--preset", "dev"], ["--build", "--preset", "dev", "--target", "localattn_cuda_emulated_module"]):
        subprocess.run(["cmake", *command], cwd=ROOT, check=True, capture_output=True)
    return BUILD / "tests/cuda/liblocalattn_cuda.so"


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package, without CUDA kernels."""
    shutil.copytree(Path(localattn.__file__).parent, tmp_path / "localattn", ignore=shutil.ignore_patterns("lib"))
    shutil.copytree(localattn._library.library_directory(), tmp_path / "localattn/lib")
    (tmp_path / "localattn/lib/liblocalattn_cuda.so").unlink(missing_ok=True)
    return tmp_path


def run(package: Path, device: Path, *command: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(package), "LOCALATTN_TEST_EMULATED_CUDA": str(device), "PYTHONSAFEPATH": "1"
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", PYTEST, "-p", "no:cacheprovider", "-q", *command], env=environment, cwd=ROOT,
        text=True, capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_without_and_with_kernels(package, device, kernels):
    run(package, device, "tests/python/cuda_without_kernels.py")
    shutil.copy(kernels, package / "localattn/lib/liblocalattn_cuda.so")
    assert " passed" in run(package, device, "tests/python/test_cuda.py")
