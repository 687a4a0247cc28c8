"""An index page for each pair of CUDA and torch, as pip reads it, beside the wheels that it lists.

python packaging/index.py dist/*.whl --into site/whl

pip install localattn-cu126 --extra-index-url https://<pages>/whl/cu126/torch2.7
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
from pathlib import Path
from urllib.parse import quote

WHEEL = re.compile(r"localattn_(?P<cuda>[a-z0-9]+)-[^-+]+\+(?P<torch>torch[\d.]+)-.*\.whl")
PAGE = "<!DOCTYPE html>\n<title>{title}</title>\n{links}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, required=True)
    options = parser.parse_args()
    links: dict[Path, list[str]] = {}
    for wheel in sorted(options.wheel):
        match = WHEEL.fullmatch(wheel.name)
        if match is None:
            continue  # a wheel for every torch comes from the registry
        project = options.into / match["cuda"] / match["torch"] / f"localattn-{match['cuda']}"
        project.mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, project)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        links.setdefault(project, []).append(f'<a href="{quote(wheel.name)}#sha256={digest}">{wheel.name}</a><br>')
    if not links:
        raise SystemExit("none of the wheels is for one torch, +torch<minor>")
    for project, entries in links.items():
        project.joinpath("index.html").write_text(PAGE.format(title=project.name, links="\n".join(entries)))
        name = project.name
        project.parent.joinpath("index.html").write_text(PAGE.format(title=name, links=f'<a href="{name}/">{name}</a>'))
    pairs = sorted(str(project.parent.relative_to(options.into)) for project in links)
    links_to_pairs = "\n".join(f'<a href="{pair}/">{pair}</a><br>' for pair in pairs)
    options.into.joinpath("index.html").write_text(PAGE.format(title="localattn wheels", links=links_to_pairs))
    print("\n".join(pairs))


if __name__ == "__main__":
    main()
