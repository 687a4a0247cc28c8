"""From a wheel with bindings for several torch versions one for each: its version ends in +torch<minor>, and it holds
that binding alone. Nothing is compiled again.

    python packaging/split.py dist/localattn_cu126-0.1.0-py3-none-manylinux_2_28_x86_64.whl --into dist
"""

from __future__ import annotations

import argparse
import functools
import re
from pathlib import Path
from zipfile import ZipFile

from relabel import relabelled

BINDING = re.compile(r".*/localattn_torch-(\d+\.\d+)-abi[01]\.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    distribution = options.wheel.name.partition("-")[0].replace("_", "-")
    options.into.mkdir(parents=True, exist_ok=True)
    for minor in sorted(minors(options.wheel)):
        keep = functools.partial(serves, minor)
        print(relabelled(options.wheel, distribution, f"torch{minor}", options.into, keep))


def minors(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {match[1] for name in archive.namelist() if (match := BINDING.fullmatch(name))}


def serves(minor: str, name: str) -> bool:
    """It is no binding, or one for this torch."""
    match = BINDING.fullmatch(name)
    return match is None or match[1] == minor


if __name__ == "__main__":
    main()
