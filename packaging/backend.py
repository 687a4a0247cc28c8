"""The build backend: scikit-build-core's, and a distribution's name and version chosen when a wheel is built.

    pip wheel . -Cdistribution=localattn-cu121                     localattn_cu121-0.1.0-py3-none-linux_x86_64.whl
    pip wheel . -Cdistribution=localattn-cpu -Clocal=torch2.13     localattn_cpu-0.1.0+torch2.13-py3-none-...

Without these settings it is a source build, localattn. The import name is localattn always. All other settings are
scikit-build-core's.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from zipfile import ZipFile

from scikit_build_core import build as _backend
from scikit_build_core.build import (  # noqa: F401  the hooks that stay as they are
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
)

# There is no prepare_metadata_for_build_wheel: who wants a wheel's metadata builds the wheel.


def build_wheel(wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None):
    settings = dict(config_settings or {})
    distribution, local = settings.pop("distribution", "localattn"), settings.pop("local", "")
    built = Path(wheel_directory, _backend.build_wheel(wheel_directory, settings, metadata_directory))
    return relabelled(built, distribution, local).name


def relabelled(wheel: Path, distribution: str, local: str) -> Path:
    """The wheel under another name, with a local version: ``localattn-cu121``, ``torch2.13``. Replaces the file."""
    if not re.fullmatch(r"localattn(-[a-z0-9]+)?", distribution):
        raise SystemExit(f"distribution must be localattn or localattn-<flavour>, got {distribution!r}")
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise SystemExit(f"local must be letters and digits with dots between, got {local!r}")
    old_name, old_version, *tags = wheel.name.split("-")
    version = old_version + (f"+{local}" if local else "")
    name = distribution.replace("-", "_")
    if (name, version) == (old_name, old_version):
        return wheel
    old_info, info = f"{old_name}-{old_version}.dist-info", f"{name}-{version}.dist-info"
    result = wheel.with_name("-".join([name, version, *tags]))
    record = []
    with ZipFile(wheel) as source, ZipFile(result, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            entry.filename = re.sub(f"^{re.escape(old_info)}/", f"{info}/", entry.filename)
            if entry.filename == f"{info}/METADATA":
                content = re.sub(rb"(?m)^Name: .*$", f"Name: {distribution}".encode(), content, count=1)
                content = re.sub(rb"(?m)^Version: .*$", f"Version: {version}".encode(), content, count=1)
            if entry.filename == f"{info}/RECORD":
                entry_of_record = entry
                continue
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{entry.filename},sha256={digest},{len(content)}\n")
            target.writestr(entry, content)
        target.writestr(entry_of_record, "".join([*record, f"{info}/RECORD,,\n"]))
    wheel.unlink()
    return result
