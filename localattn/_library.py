"""Finds and loads the native parts: the core library (C API) and the binding for the torch that is running.

Importing localattn never fails because of them: what went wrong is kept in `load_error` and raised, in full, by the
first call that needs an operator.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
BINDING_PREFIX = "localattn_torch-"


def library_directory() -> Path:
    """Where the libraries lie: beside this file, or, where this file is run from a source tree, in the installation."""
    candidates = [Path(__file__).parent / "lib"]
    try:
        candidates.append(Path(metadata.distribution("localattn").locate_file("localattn/lib")))
    except metadata.PackageNotFoundError:
        pass
    for directory in candidates:
        if any(directory.glob("liblocalattn.so*")):
            return directory
    raise OSError(f"localattn's native library is not installed; looked in {', '.join(map(str, candidates))}")


def _load_binding() -> str | None:
    """Registers the operators. Returns what is wrong, or None."""
    try:
        directory = library_directory()
    except OSError as error:
        return str(error)
    binding = directory / f"{BINDING_PREFIX}{TORCH_MINOR}.so"
    built_for = sorted(path.stem.removeprefix(BINDING_PREFIX) for path in directory.glob(f"{BINDING_PREFIX}*.so"))
    if not binding.exists():
        return (
            f"localattn in {directory} was built for torch {', '.join(built_for) or '(no version at all)'}, but torch "
            f"{torch.__version__} is running. Install a localattn built for torch {TORCH_MINOR}, or build it: "
            "pip install --no-build-isolation <source tree>"
        )
    try:
        torch.ops.load_library(str(binding))
    except OSError as error:
        return f"{binding}, built for torch {TORCH_MINOR}, does not load with torch {torch.__version__}: {error}"
    return None


load_error = _load_binding()


def require_operators() -> None:
    """Raises RuntimeError, with the reason, if the operators are not there."""
    if load_error is not None:
        raise RuntimeError(load_error)


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
    library = ctypes.CDLL(str(min(library_directory().glob("liblocalattn.so*"))))
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
