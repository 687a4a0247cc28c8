"""Finds and loads the native parts: the core library (C API) and the binding for the torch that is running.

Importing localattn never fails because of them: what went wrong is kept in `load_error` and raised, in full, by the
first call that needs an operator.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from . import _distribution

TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
CXX11_ABI = int(torch.compiled_with_cxx11_abi())


def library_directory() -> Path:
    """Where the libraries lie: beside this file, or, where this file is run from a source tree, in the installation."""
    candidates = [Path(__file__).parent / "lib"]
    candidates += [Path(d.locate_file("localattn/lib")) for d in _distribution.installed()]
    for directory in candidates:
        if any(directory.glob("liblocalattn.so.*")):
            return directory
    raise OSError(f"localattn's native library is not installed; looked in {', '.join(map(str, candidates))}")


# ---- the binding -----------------------------------------------------------------------------------------------------


class Binding(NamedTuple):
    """The operators, compiled for one torch minor version."""

    torch: str
    cxx11_abi: int  # torch's _GLIBCXX_USE_CXX11_ABI: 0 is libstdc++'s old std::string
    path: Path

    def __str__(self) -> str:
        return f"torch {self.torch}" + ("" if self.cxx11_abi else " (old C++ ABI)")


def bindings(directory: Path) -> list[Binding]:
    """Those installed, the oldest torch first."""
    found = []
    for path in directory.glob("localattn_torch-*.so"):
        if match := re.fullmatch(r"localattn_torch-(\d+\.\d+)-abi([01])\.so", path.name):
            found.append(Binding(match[1], int(match[2]), path))
    return sorted(found, key=lambda binding: (_number(binding.torch), binding.cxx11_abi))


def _number(minor: str) -> tuple[int, ...]:
    return tuple(map(int, minor.split(".")))


class Loaded(NamedTuple):
    """How the operators came to be registered, or why they are not."""

    how: str
    error: str | None = None
    registration: torch.library.Library | None = None  # what keeps operators registered that are no binding's


def _load() -> Loaded:
    try:
        directory = library_directory()
    except OSError as error:
        return _failed(str(error), _distribution.install_command())
    forced = os.environ.get("LOCALATTN_BINDING")
    if forced == "c-api":
        return _through_c_api("LOCALATTN_BINDING=c-api")
    if forced:
        return _failed(f'LOCALATTN_BINDING is "{forced}"; it may be "c-api"', "unset LOCALATTN_BINDING")
    present = bindings(directory)
    for binding in present:
        if (binding.torch, binding.cxx11_abi) == (TORCH_MINOR, CXX11_ABI):
            return _through(binding)
    if present and _number(TORCH_MINOR) > _number(present[-1].torch):
        reason = f"torch {torch.__version__} is newer than the bindings here, the newest for torch {present[-1].torch}"
        warnings.warn(
            f"localattn: {reason}. It works through the C API: the same kernels and results, but each call costs some "
            f"tens of microseconds more. A newer localattn may have a binding: {_distribution.upgrade_command()}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _through_c_api(reason)
    if _number(TORCH_MINOR) < (2, 4):
        command = "pip install 'torch>=2.4'"
    elif "+" in _distribution.version() or not present:
        command = _distribution.install_command()
    else:
        command = _distribution.upgrade_command()
    built_for = ", ".join(map(str, present)) or "no torch at all"
    running = f"torch {torch.__version__}" + ("" if CXX11_ABI else " (old C++ ABI)")
    return _failed(
        f"{_distribution.named()} in {directory.parent} was built for {built_for}, but {running} is running", command
    )


def _through(binding: Binding) -> Loaded:
    try:
        torch.ops.load_library(str(binding.path))
    except OSError as error:
        return _failed(
            f"{binding.path}, which {_distribution.named()} built for {binding}, does not load with torch "
            f"{torch.__version__} from {Path(torch.__file__).parent}: {error.__cause__ or error}",  # the loader's words
            _distribution.install_command(),
        )
    return Loaded(f"{binding.path.name}, built for this torch minor version and its C++ ABI")


def _through_c_api(reason: str) -> Loaded:
    try:
        core()
    except OSError as error:
        return _failed(f"localattn's library does not load: {error}", _distribution.install_command())
    from . import _c_api

    return Loaded(f"the C API, because {reason}", registration=_c_api.register())


def _failed(problem: str, command: str) -> Loaded:
    text = f"{problem}. To mend it: {command}"
    if conflict := _distribution.conflict():
        text += f"\nBesides: {conflict}"
    return Loaded("not registered", text)


# ---- the C API's introspection ---------------------------------------------------------------------------------------


class VariantInfo(NamedTuple):
    """One kernel variant of the core library."""

    name: str
    description: str
    unavailable: str | None  # why this machine cannot run it; None if it can

    @property
    def device(self) -> str:
        """The type of the devices whose tensors it serves."""
        return "cuda" if self.name.startswith("cuda_") else "cpu"


class _CVariantInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("unavailable", ctypes.c_char_p),
    ]


@functools.cache
def core() -> ctypes.CDLL:
    """The core library. Raises OSError where it is not installed or does not load."""
    found = library_directory().glob("liblocalattn.so.*")
    library = ctypes.CDLL(str(max(found, key=lambda path: _number(path.name.partition(".so.")[2]))))
    library.localattn_version.restype = ctypes.c_char_p
    library.localattn_build_info.restype = ctypes.c_char_p
    return library


def version() -> str:
    """Version of the core library, "major.minor.patch"."""
    return core().localattn_version().decode()


def build_info() -> str:
    """Compiler, build type and languages the core library was built with."""
    return core().localattn_build_info().decode()


def variants() -> list[VariantInfo]:
    """The kernel variants built into the core library, best first."""
    found = []
    for index in range(core().localattn_variant_count()):
        info = _CVariantInfo(ctypes.sizeof(_CVariantInfo))
        if core().localattn_get_variant_info(index, ctypes.byref(info)) != 0:
            raise RuntimeError(f"localattn_get_variant_info({index}) failed")
        unavailable = None if info.unavailable is None else info.unavailable.decode()
        found.append(VariantInfo(info.name.decode(), info.description.decode(), unavailable))
    return found


if _distribution.conflict():
    warnings.warn(f"localattn: {_distribution.conflict()}", RuntimeWarning, stacklevel=2)
loaded = _load()
load_error = loaded.error


def require_operators() -> None:
    """Raises RuntimeError, with the reason, if the operators are not there."""
    if load_error is not None:
        raise RuntimeError(load_error)
