"""Which torch releases exist for which CUDA: the matrix that CI builds and tests, as PyTorch's indexes have it today.

    python packaging/pairs.py

Prints `flavours` and `pairs`, each as JSON, the way a GitHub job takes its outputs. Of each torch minor version from
2.4 on the newest release counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

FLAVOURS = ("cpu", "cu121", "cu124", "cu126", "cu128", "cu130", "cu132")
OLDEST = (2, 4)
INDEX = "https://download.pytorch.org/whl/{flavour}"
PYTHON = "3.11"  # there is a wheel of every torch since 2.4 for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", default=INDEX, help="where {flavour} is replaced by cpu, cu121 and so on")
    parser.add_argument("--unpacked", default="/tmp/torch", help="where CI unpacks torch")
    options = parser.parse_args()
    flavours, pairs = [], []
    for flavour in FLAVOURS:
        index = options.index.format(flavour=flavour)
        # Whatever else pip is told to look at has no such versions.
        chosen = newest([version for version in releases(index) if version.endswith(f"+{flavour}")])
        if not chosen:
            sys.exit(f"{index} has no torch from {OLDEST[0]}.{OLDEST[1]} on")
        machines = ["x86_64", "aarch64"] if flavour == "cpu" else ["x86_64"]
        for machine in machines:
            flavours.append(
                {
                    "cuda": flavour,
                    "machine": machine,
                    "index": index,
                    "torch": " ".join(chosen),
                    "roots": ";".join(f"{options.unpacked}/{release}/torch" for release in chosen),
                }
            )
            pairs += [{"cuda": flavour, "machine": machine, "index": index, "torch": release} for release in chosen]
    print(f"flavours={json.dumps(flavours)}")
    print(f"pairs={json.dumps(pairs)}")


def releases(index: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--index-url", index]
    command += ["--python-version", PYTHON, "--only-binary", ":all:"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^Available versions: (.*)$", listed, re.MULTILINE)
    return found[1].split(", ") if found else []


def newest(versions: list[str]) -> list[str]:
    """The newest release of each minor version that counts, the oldest first."""
    best: dict[tuple[int, int], int] = {}
    for version in versions:
        if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d+)(\+.*)?", version):
            major, minor, patch = map(int, match.groups()[:3])
            if (major, minor) >= OLDEST:
                best[major, minor] = max(patch, best.get((major, minor), 0))
    return [f"{major}.{minor}.{patch}" for (major, minor), patch in sorted(best.items())]


if __name__ == "__main__":
    main()
