"""``python -m localattn``: what is installed, a demonstration, measurements; where C and C++ find the library."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# Each has main(arguments), and the options that belong to it.
COMMANDS = {
    "info": ("._info", "versions, kernel variants and which is chosen, threads, torch, build facts"),
    "demo": (".demo", "train a small denoiser on photographs, about a minute and a half"),
    "bench": (".bench", "measure speed and memory beside other implementations"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m localattn",
        description="Local attention on images, signals and video.",
        epilog="commands:\n" + "\n".join(f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--includes", action="store_true", help="print the directory of localattn/localattn.h")
    parser.add_argument("--cmakedir", action="store_true", help="print the directory for CMake's localattn_DIR")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="command", help=", ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; see: command --help")
    options = parser.parse_args()
    if options.includes:
        print(_installed("include"))
    if options.cmakedir:
        print(_installed("lib/cmake/localattn"))
    if options.command is not None:
        _import(options.command).main(options.arguments)
    elif not (options.includes or options.cmakedir):
        parser.print_help()
        sys.exit(2)


def _installed(part: str) -> Path:
    """A directory of the installed package; an editable installation keeps it elsewhere than the Python files."""
    from ._library import library_directory

    try:
        return library_directory().parent / part
    except OSError as error:
        sys.exit(str(error))


def _import(command: str):
    try:
        return importlib.import_module(COMMANDS[command][0], __package__)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("localattn"):
            raise
        sys.exit(
            f"python -m localattn {command} needs {error.name.partition('.')[0]}: pip install 'localattn[{command}]'"
        )


if __name__ == "__main__":
    main()
