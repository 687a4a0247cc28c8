"""``python -m localattn info``: what is installed and what a call would use, for bug reports and the curious."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch

from . import _distribution, _library
from .ops import attention_variant


def main(argv: list[str]) -> None:
    argparse.ArgumentParser(prog="python -m localattn info", description="Versions, variants, build facts.").parse_args(
        argv
    )
    for title, facts in _sections().items():
        print(title)
        for name, text in facts:
            print(f"  {name:<14} {text}")
    if _library.load_error is not None:
        sys.exit(1)


def _sections() -> dict[str, list[tuple[str, str]]]:
    return {
        "localattn": _package(),
        "kernel variants, best first": _variants(),
        "torch": _torch(),
        "GPU": _gpu(),
        "machine": [
            ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
            ("C library", " ".join(platform.libc_ver()) or "unknown"),
            ("Python", f"{platform.python_version()}, {sys.executable}"),
            ("processor", processor()),
        ],
    }


def _package() -> list[tuple[str, str]]:
    facts = [("distribution", _distribution.named())]
    if conflict := _distribution.conflict():
        facts.append(("conflict", conflict))
    facts.append(("Python files", str(Path(__file__).parent)))
    try:
        directory = _library.library_directory()
        facts += [
            ("library", f"{_library.version()} in {directory}"),
            ("built by", _library.build_info()),
            ("CUDA kernels", _cuda_kernels(directory)),
            ("bindings", ", ".join(map(str, _library.bindings(directory))) or "none"),
        ]
    except OSError as error:
        facts.append(("library", str(error)))
    facts.append(("operators", _library.load_error or f"through {_library.loaded.how}"))
    return facts


def _cuda_kernels(directory: Path) -> str:
    path = directory / "liblocalattn_cuda.so"
    if not path.exists():
        return "none: built for the CPU alone"
    return f"{path.name}, {path.stat().st_size / 2**20:.0f} MiB"


def _variants() -> list[tuple[str, str]]:
    try:
        variants = _library.variants()
    except OSError:
        return []
    facts = []
    for variant in variants:
        state = "runs here" if variant.unavailable is None else f"not here: {variant.unavailable}"
        facts.append((variant.name, f"{state} ({variant.description})"))
    forced = os.environ.get("LOCALATTN_CPU_ISA")
    if forced:
        facts.append(("forced", f"LOCALATTN_CPU_ISA={forced}"))
    if _library.load_error is None:
        facts += _choices()
    return facts


def _choices() -> list[tuple[str, str]]:
    """Which variant a plain call takes, by dtype, and why the better ones would not."""
    facts = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.zeros(1, 32, 32, 1, 32, dtype=dtype)
        taken = []
        for backward in (False, True):
            try:
                chosen, declined = attention_variant(x, x, x, 7, backward=backward)
                taken.append("; ".join([chosen, *declined.splitlines()]))
            except (RuntimeError, ValueError) as error:  # a variant was forced that cannot
                taken.append(str(error))
        text = taken[0] if taken[0] == taken[1] else f"{taken[0]} (backward: {taken[1]})"
        facts.append((str(dtype).removeprefix("torch."), f"takes {text}"))
    return facts


def _torch() -> list[tuple[str, str]]:
    return [
        ("version", f"{torch.__version__} in {Path(torch.__file__).parent}"),
        ("C++ ABI", "new (_GLIBCXX_USE_CXX11_ABI=1)" if _library.CXX11_ABI else "old (_GLIBCXX_USE_CXX11_ABI=0)"),
        ("threads", f"{torch.get_num_threads()}; localattn computes on these"),
        ("CUDA", torch.version.cuda or "not in this torch"),
    ]


def _gpu() -> list[tuple[str, str]]:
    facts = [("driver", _driver())]
    if not torch.cuda.is_available():
        return [*facts, ("device", "none that torch can use")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        facts.append((f"device {index}", f"{name}, compute capability {major}.{minor}: {_code_for(major, minor)}"))
    return facts


def _code_for(major: int, minor: int) -> str:
    """What of the kernels' code a device of this compute capability runs: machine code serves its major version from
    its minor version on, and the newest is there as PTX too, for what comes later."""
    try:
        listed = re.search(r"compute capabilities ([\d, ]+)", _library.build_info())
    except OSError:
        listed = None
    if listed is None:
        return "nothing here is for GPUs"
    built = sorted(map(int, listed[1].split(",")))
    capability = 10 * major + minor
    if fitting := [number for number in built if number // 10 == major and number <= capability]:
        return f"runs the machine code of sm_{fitting[-1]}"
    if capability > built[-1]:
        return f"the driver compiles the PTX of compute_{built[-1]} for it"
    return f"too old: the kernels are for {', '.join(f'{n // 10}.{n % 10}' for n in built)} and later"


def _driver() -> str:
    """The NVIDIA driver's version and the CUDA version it serves."""
    number = ctypes.c_int()
    try:
        result = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError) as error:  # AttributeError: a library of that name that is no driver
        return f"none: {error}"
    if result != 0:
        return "libcuda.so.1 does not tell its version"
    serves = f"serves CUDA {number.value // 1000}.{number.value % 1000 // 10}"
    try:
        version = re.search(r"\d+\.[\d.]+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        version = None
    return f"{version[0]}, {serves}" if version else serves


def processor() -> str:
    """Model and logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or "unknown"
    return f"{model}, {os.cpu_count()} logical cores"
