"""What an installed package holds for C and C++ projects, and what its parts say of each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import numpy as np
import pytest
import torch

from localattn import _c_api, _library

ROOT = Path(__file__).parents[2]
CONSUMERS = ROOT / "tests" / "consumer"


def commands(*arguments: str | Path, **environment: str) -> str:
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_and_run(project: str, build: Path, *options: str, **environment: str) -> str:
    commands("cmake", "-S", CONSUMERS / project, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options, **environment)
    commands("cmake", "--build", build)
    return commands(build / "consumer")


@pytest.fixture(scope="module")
def cmake_package() -> str:
    return commands(sys.executable, "-m", "localattn", "--cmakedir").strip()


@pytest.mark.parametrize("project", ["c", "cpp"])
def test_find_package(project: str, cmake_package: str, tmp_path: Path) -> None:
    build_and_run(project, tmp_path, f"-Dlocalattn_DIR={cmake_package}")


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="there is no pkg-config")
def test_pkg_config(cmake_package: str, tmp_path: Path) -> None:
    library = Path(cmake_package).parents[1]
    search = str(library / "pkgconfig")
    output = build_and_run("c", tmp_path, "-DUSE_PKG_CONFIG=ON", PKG_CONFIG_PATH=search)
    assert output == f"localattn {_library.version()}\n"


def test_cmake_root_entry_point(cmake_package: str) -> None:
    (entry,) = (e for e in metadata.entry_points(group="cmake.root") if e.name == "localattn")
    root = Path(str(resources.files(entry.load())))
    if not (root / "lib").exists():
        pytest.skip(f"{root} is a source tree, whose library lies elsewhere")
    assert (root / "lib" / "cmake" / "localattn").samefile(cmake_package)


def soname() -> str:
    """Until 1.0 a minor version may change what programs rely on."""
    major, minor, _ = _library.version().split(".")
    return f"liblocalattn.so.{major}" if int(major) else f"liblocalattn.so.{major}.{minor}"


def test_programs_ask_for_the_versions_that_serve_them(cmake_package: str) -> None:
    dynamic = commands("readelf", "-dW", Path(cmake_package).parents[1] / soname())
    assert f"Library soname: [{soname()}]" in dynamic


def test_the_library_exports_what_the_header_declares(cmake_package: str) -> None:
    library = Path(cmake_package).parents[1]
    commands(
        "cmake", "-DNM=nm", f"-DLIBRARY={library / soname()}",
        f"-DHEADER={library.parent}/include/localattn/localattn.h",
        "-P", ROOT / "tests" / "core" / "exported_symbols.cmake",
    )  # fmt: skip


def test_the_structs_read_from_the_header_are_the_compilers(tmp_path: Path) -> None:
    lines = []
    for name, struct in _c_api._STRUCTS.items():
        lines.append(f'    printf("{name} %zu\\n", sizeof(localattn_{name}));')
        lines += [
            f'    printf("{name}.{field[0]} %zu\\n", offsetof(localattn_{name}, {field[0]}));'
            for field in struct._fields_
        ]
    program = tmp_path / "layout.c"
    program.write_text(
        "#include <localattn/localattn.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "\n    return 0;\n}\n"
    )
    include = commands(sys.executable, "-m", "localattn", "--includes").strip()
    commands(os.environ.get("CC", "cc"), f"-I{include}", program, "-o", tmp_path / "layout")
    expected = {}
    for name, struct in _c_api._STRUCTS.items():
        expected[name] = _c_api.ctypes.sizeof(struct)
        expected |= {f"{name}.{field[0]}": getattr(struct, field[0]).offset for field in struct._fields_}
    told = dict(line.split() for line in commands(tmp_path / "layout").splitlines())
    assert {name: int(number) for name, number in told.items()} == expected
    assert len(expected) > 100


def test_the_c_api_has_the_bindings_operators() -> None:
    for schema in _c_api.SCHEMAS:
        name = schema.partition("(")[0]
        registered = getattr(torch.ops.localattn, name).default._schema
        assert torch._C.parse_schema(f"localattn::{schema}") == registered
    operators = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "localattn::" in name}
    assert operators == {schema.partition("(")[0] for schema in _c_api.SCHEMAS}


@pytest.fixture(scope="module")
def nonlocal_means(cmake_package: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("example")
    source = ROOT / "examples" / "c"
    commands("cmake", "-S", source, "-B", build, f"-Dlocalattn_DIR={cmake_package}", "-DCMAKE_C_FLAGS=-Wall -Werror")
    commands("cmake", "--build", build)
    return build / "nonlocal_means"


def test_the_example_filters_an_image_file(nonlocal_means: Path, tmp_path: Path) -> None:
    """Non-local means, by its definition: weights from squared differences of neighbourhoods, one pixel at a time."""
    height, width, window, strength = 14, 19, 7, 25.0
    clean = (np.indices((height, width)).sum(0) // 6 % 2 * 120.0 + 60)[..., None] + np.array([0.0, 10.0, 30.0])
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, strength, clean.shape), 0, 255).astype(np.uint8)
    source, target = tmp_path / "noisy.ppm", tmp_path / "smooth.ppm"
    source.write_bytes(b"P6\n# a comment\n%d %d\n255\n" % (width, height) + noisy.tobytes())
    commands(nonlocal_means, source, target, str(window), str(strength))
    header, smooth = target.read_bytes().split(b"255\n", 1)
    assert header == b"P6\n%d %d\n" % (width, height)
    smooth = np.frombuffer(smooth, np.uint8).reshape(noisy.shape).astype(float)

    padded = np.pad(noisy.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    patches = np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=-1)
    expected = np.empty(noisy.shape)
    for y in range(height):
        for x in range(width):
            near = np.s_[max(y - window // 2, 0) : y + window // 2 + 1, max(x - window // 2, 0) : x + window // 2 + 1]
            distance = ((patches[near] - patches[y, x]) ** 2).sum((-1, -2))
            weight = np.exp(-distance / (27 * 2 * strength**2))
            expected[y, x] = (weight[..., None] * noisy[near]).sum((0, 1)) / weight.sum()
    assert np.abs(smooth - expected).max() < 0.51  # rounded to whole numbers
    assert np.abs(smooth - clean).mean() < 0.75 * np.abs(noisy - clean).mean()


def test_the_example_refuses_what_is_no_image(nonlocal_means: Path, tmp_path: Path) -> None:
    for name, content in {
        "text": b"not an image",
        "short": b"P6\n4 4\n255\nabc",
        "deep": b"P6\n1 1\n65535\nabcdef",
    }.items():
        source = tmp_path / name
        source.write_bytes(content)
        done = subprocess.run([nonlocal_means, source, tmp_path / "out.ppm"], capture_output=True, text=True)
        assert done.returncode == 1
        assert str(source) in done.stderr
        assert not (tmp_path / "out.ppm").exists()
