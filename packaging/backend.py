"""The build backend: scikit-build-core's, and a distribution's name and version chosen when a wheel is built.

    pip wheel . -Cdistribution=localattn-cu121                     localattn_cu121-0.1.0-py3-none-linux_x86_64.whl
    pip wheel . -Cdistribution=localattn-cpu -Clocal=torch2.13     localattn_cpu-0.1.0+torch2.13-py3-none-...

Without these settings it is a source build, localattn. The import name is localattn always. All other settings are
scikit-build-core's.
"""

from __future__ import annotations

from pathlib import Path

from relabel import relabelled
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


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    settings = dict(config_settings or {})
    distribution, local = settings.pop("distribution", "localattn"), settings.pop("local", "")
    built = Path(wheel_directory, _backend.build_wheel(wheel_directory, settings, metadata_directory))
    if distribution == "localattn" and not local:
        return built.name
    wheel = relabelled(built, distribution, local)
    built.unlink()
    return wheel.name
