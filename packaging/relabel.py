"""A wheel under another name, with a local version, with some of its files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile


def relabelled(
    wheel: Path, distribution: str, local: str = "", into: Path | None = None, keep: Callable[[str], bool] | None = None
) -> Path:
    """Writes the wheel of distribution ``localattn-cu121`` and local version ``torch2.13`` into the folder, that of the
    wheel unless told, holding the files whose paths `keep` accepts."""
    if not re.fullmatch(r"localattn(-[a-z0-9]+)?", distribution):
        raise ValueError(f"distribution must be localattn or localattn-<flavour>, got {distribution!r}")
    if local and not re.fullmatch(r"[a-z0-9]+(\.[a-z0-9]+)*", local):
        raise ValueError(f"local must be letters and digits with dots between, got {local!r}")
    old_name, old_version, *tags = wheel.name.split("-")
    name, version = distribution.replace("-", "_"), old_version + (f"+{local}" if local else "")
    old_info, info = f"{old_name}-{old_version}.dist-info", f"{name}-{version}.dist-info"
    result = (into or wheel.parent) / "-".join([name, version, *tags])
    record = []
    with ZipFile(wheel) as source, ZipFile(result, "w") as target:
        for entry in source.infolist():
            if entry.is_dir() or (keep and not keep(entry.filename)):
                continue
            content = source.read(entry)
            entry.filename = re.sub(f"^{re.escape(old_info)}/", f"{info}/", entry.filename)
            if entry.filename == f"{info}/METADATA":
                content = re.sub(rb"(?m)^Name: .*$", f"Name: {distribution}".encode(), content, count=1)
                content = re.sub(rb"(?m)^Version: .*$", f"Version: {version}".encode(), content, count=1)
            if entry.filename == f"{info}/RECORD":
                record_entry = entry
                continue
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{entry.filename},sha256={digest},{len(content)}\n")
            target.writestr(entry, content)
        target.writestr(record_entry, "".join([*record, f"{info}/RECORD,,\n"]))
    return result
