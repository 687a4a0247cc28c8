"""Every example of README.md and of the documentation, as it stands there."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import localattn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(*arguments: str | Path) -> str:
    return subprocess.run([*map(str, arguments)], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("page", "example"),
    [
        pytest.param(page, text, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks("python", page.read_text()), 1)
    ],
)
def test_python(page: Path, example: str) -> None:
    exec(compile(example, str(page), "exec"), {})


@pytest.fixture(scope="module")
def attend(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """README's C function, built by README's CMakeLists.txt against the installed package."""
    source = tmp_path_factory.mktemp("readme")
    (source / "attend.c").write_text(blocks("c")[0])
    (source / "CMakeLists.txt").write_text(blocks("cmake")[0])
    package = commands(sys.executable, "-m", "localattn", "--cmakedir").strip()
    commands("cmake", "-S", source, "-B", source / "build", f"-Dlocalattn_DIR={package}", "-DCMAKE_BUILD_TYPE=Release")
    commands("cmake", "--build", source / "build")
    return ctypes.CDLL(str(source / "build" / "libattend.so"))


def test_c_and_cmake(attend: ctypes.CDLL) -> None:
    height, width = 13, 17
    query, key, value = torch.randn(3, height, width, 16)
    output = torch.full_like(value, float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (query, key, value, output)]
    status = attend.attend(*pointers, ctypes.c_int64(height), ctypes.c_int64(width))
    assert status == 0
    expected = localattn.reference.local_attention(*(x[None, :, :, None] for x in (query, key, value)), 7)
    torch.testing.assert_close(output, expected[0, :, :, 0])


def test_c_compiles_without_cmake(tmp_path: Path) -> None:
    (tmp_path / "attend.c").write_text(blocks("c")[0])
    include = commands(sys.executable, "-m", "localattn", "--includes").strip()
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-c", f"-I{include}"]
    commands(os.environ.get("CC", "cc"), *flags, tmp_path / "attend.c", "-o", tmp_path / "attend.o")


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "drawings").glob("*.py")), ids=lambda script: script.stem)
def test_drawings_are_what_their_code_draws(script: Path, tmp_path: Path) -> None:
    name = script.stem.replace("_", "-") + ".svg"
    commands(sys.executable, script, tmp_path / name)
    assert (tmp_path / name).read_text() == (ROOT / "docs" / "images" / name).read_text()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"^\$ make ([a-z-]+)", "\n".join(blocks("console")), flags=re.MULTILINE))
    named |= set(re.findall(r"`make ([a-z-]+)", README))
    assert named, "README names no make target"
    assert named <= targets
