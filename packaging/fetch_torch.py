"""Fetches what bindings are built against: of each torch release named, headers, libraries and version, unpacked from
its wheel without its dependencies. Prints the folders, as LOCALATTN_TORCH_ROOTS takes them.

    python packaging/fetch_torch.py --into build/torch 2.4.1 2.13.0

A release that is installed in this Python is taken from there. Settings for pip, such as its index, come from the PIP_*
variables of the environment.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

NEEDED = re.compile(
    r"torch/(version\.py|include/.*|lib/lib(c10|c10_cuda|torch|torch_cpu|torch_cuda)\.so|share/cmake/Torch/TorchConfig\.cmake)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="where releases are unpacked, a folder for each")
    parser.add_argument("release", nargs="+", help="such as 2.13.0")
    options = parser.parse_args()
    print(";".join(str(installed(release) or fetched(release, options.into)) for release in options.release))


def installed(release: str) -> Path | None:
    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return None
    return Path(torch.locate_file("torch")) if torch.version.partition("+")[0] == release else None


def fetched(release: str, into: Path) -> Path:
    folder = into.absolute() / release
    if not (folder / "torch" / "version.py").exists():
        with tempfile.TemporaryDirectory() as downloads:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloads]
            subprocess.run([*pip, f"torch=={release}"], check=True, stdout=sys.stderr)
            (wheel,) = Path(downloads).glob("*.whl")
            with ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if NEEDED.fullmatch(name)]
                names.sort(key=lambda name: name.endswith("version.py"))  # last: it tells that the others are there
                archive.extractall(folder, names)
    return folder / "torch"


if __name__ == "__main__":
    main()
