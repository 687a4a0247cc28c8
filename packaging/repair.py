"""Makes a built wheel one for other machines, and refuses one that would not work there.

    python packaging/repair.py build/wheel/localattn_cpu-0.1.0-py3-none-linux_x86_64.whl --into dist

auditwheel gives it the tag manylinux_2_28 and says why if it cannot have it. Nothing is copied into the wheel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

# What the wheel uses and does not hold.
EXCLUDED = {
    "libtorch*.so": "torch's: a copy would be a second torch in the process",
    "libc10*.so": "torch's too",
    "liblocalattn.so.*": "in the wheel already, beside the bindings, where C and C++ projects look for it",
    "libcuda.so.1": "the driver's: it belongs to the machine's kernel module",
    "libcudart.so.*": "linked statically, so nothing asks for it; torch brings its own",
}
MAY_NEED = re.compile(
    r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|ld-linux-[\w-]+|libtorch_cpu|libtorch|libc10|liblocalattn)"
    r"\.so(\.\d+)*|(libtorch_cuda|libc10_cuda)\.so"
)
LARGEST = 100 * 2**20  # what the registry takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    machine = options.wheel.stem.partition("linux_")[2]
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", f"manylinux_2_28_{machine}", "--only-plat"]
    command += [argument for pattern in EXCLUDED for argument in ("--exclude", pattern)]
    subprocess.run([*command, "--wheel-dir", options.into, options.wheel], check=True)
    name, version, *_ = options.wheel.name.split("-")
    (repaired,) = options.into.glob(f"{name}-{version}-*manylinux*_{machine}.whl")
    check(repaired)
    print(f"{repaired}: {repaired.stat().st_size / 2**20:.1f} MiB")


def check(wheel: Path) -> None:
    """Exits with what is wrong."""
    problems = []
    if wheel.stat().st_size > LARGEST:
        problems.append(f"it has {wheel.stat().st_size} bytes, more than {LARGEST}")
    with ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        if any(".libs/" in name for name in names):
            problems.append(f"libraries were copied into it: {[name for name in names if '.libs/' in name]}")
        if not any(re.search(r"/localattn_torch-[\d.]+-abi[01]\.so$", name) for name in names):
            problems.append("it has no binding")
        for name in names:
            if re.search(r"\.so(\.\d+)*$", name) and archive.read(name).startswith(b"\x7fELF"):
                problems += needs(Path(archive.extract(name, folder)), name)
    if problems:
        sys.exit(f"{wheel}:\n  " + "\n  ".join(problems))


def needs(library: Path, name: str) -> list[str]:
    dynamic = subprocess.run(["readelf", "-dW", library], check=True, capture_output=True, text=True).stdout
    problems = [
        f"{name} needs {needed}"
        for needed in re.findall(r"NEEDED.*\[(.*)\]", dynamic)
        if not MAY_NEED.fullmatch(needed)
    ]
    for path in re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic):
        if path != "$ORIGIN":
            problems.append(f"{name} looks for libraries in {path}")
    return problems


if __name__ == "__main__":
    main()
