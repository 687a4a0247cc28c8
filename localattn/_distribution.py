"""The installed distribution: localattn (built from source), localattn-cpu, localattn-cu121 and so on. All of them hold
this package, so no more than one may be installed."""

from __future__ import annotations

import functools
import json
import re
import sys
from importlib import metadata
from pathlib import Path

_INFO = re.compile(r"(localattn(?:_cpu|_cu\d+)?)-[^-]+\.dist-info")


@functools.cache
def installed() -> tuple[metadata.Distribution, ...]:
    """One distribution per name: the one that is imported first, and any that should not be beside it."""
    found: dict[str, metadata.Distribution] = {}
    folders = [Path(__file__).parents[1], *(Path(entry or ".") for entry in sys.path)]
    for folder in dict.fromkeys(folder.absolute() for folder in folders):
        for info in sorted(folder.glob("localattn*.dist-info")):
            match = _INFO.fullmatch(info.name)
            if match and (info / "METADATA").is_file():
                found.setdefault(match[1].replace("_", "-"), metadata.PathDistribution(info))
    return tuple(found.values())


def version() -> str:
    return installed()[0].version if installed() else "0+unknown"


def named() -> str:
    """Name and version."""
    if not installed():
        return "localattn, imported from a source tree that is not installed,"
    return " and ".join(f"{distribution.name} {distribution.version}" for distribution in installed())


def conflict() -> str | None:
    """What is wrong if several are installed, and the commands that mend it."""
    if len(installed()) < 2:
        return None
    names = [distribution.name for distribution in installed()]
    return (
        f"{named()} are installed at once; each holds the package localattn, and the files of one overwrite or hide "
        f"those of the other. Keep one: pip uninstall -y {' '.join(names)} && {install_command(installed()[-1])}"
    )


def install_command(distribution: metadata.Distribution | None = None) -> str:
    """The pip command that installs this distribution anew, with every binding there is."""
    if distribution is None:
        if not installed():
            return "pip install --no-build-isolation <source tree>"
        distribution = installed()[0]
    if distribution.name == "localattn":
        return f"pip install --force-reinstall --no-deps --no-build-isolation {_source(distribution)}"
    # Without the local version, as in 0.1.0+torch2.13, it is the wheel with all bindings.
    return f"pip install --force-reinstall --no-deps {distribution.name}=={distribution.version.partition('+')[0]}"


def upgrade_command() -> str:
    """The pip command that may bring a binding for a newer torch."""
    if not installed() or installed()[0].name == "localattn":
        return install_command()
    return f"pip install --upgrade --no-deps {installed()[0].name}"


def _source(distribution: metadata.Distribution) -> str:
    try:
        url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    except ValueError:
        url = ""
    return url.removeprefix("file://") or "<source tree>"
