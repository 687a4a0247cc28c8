"""``python -m localattn``, run as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import localattn


def run(*arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "localattn", *arguments],
        check=check,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_info_tells_versions_variants_and_choice() -> None:
    text = run("info").stdout
    assert torch.__version__ in text
    assert localattn._library.version() in text
    for variant in localattn._library.variants():
        assert re.search(rf"^  {variant.name} ", text, flags=re.MULTILINE)
    best = next(variant.name for variant in localattn._library.variants() if variant.unavailable is None)
    assert re.search(rf"float32 +takes {best}", text)


def test_info_shows_a_forced_variant() -> None:
    text = run("info", LOCALATTN_CPU_ISA="reference").stdout
    assert "LOCALATTN_CPU_ISA=reference" in text
    assert re.search(r"float32 +takes reference", text)


def test_info_shows_what_is_wrong_with_a_forced_name() -> None:
    text = run("info", LOCALATTN_CPU_ISA="nonsense").stdout
    assert 'takes LOCALATTN_CPU_ISA is "nonsense"' in text


def test_directories_hold_what_they_are_for() -> None:
    include, cmake = (Path(line) for line in run("--includes", "--cmakedir").stdout.splitlines())
    assert (include / "localattn" / "localattn.h").is_file()
    assert (cmake / "localattn-config.cmake").is_file()


def test_without_a_command_there_is_help() -> None:
    result = run(check=False)
    assert result.returncode == 2
    assert "info" in result.stdout


def test_unknown_command_is_refused() -> None:
    result = run("bake", check=False)
    assert result.returncode == 2
    assert "bake" in result.stderr


def test_missing_dependency_is_named() -> None:
    code = (
        "import sys; sys.modules['skimage'] = None; sys.argv = ['localattn', 'demo'];"
        "from localattn.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs skimage: pip install 'localattn[demo]'" in result.stderr


def test_demo_denoises_and_compares(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    result = run("demo", "--steps", "60", "--threads", "1", "--output", str(picture), MPLBACKEND="")
    assert picture.read_bytes().startswith(b"\x89PNG")
    quality = {
        name: float(psnr) for name, psnr in re.findall(r"^  (\w[\w -]+?) +(\d+\.\d+) dB", result.stdout, re.MULTILINE)
    }
    assert quality["Local attention"] > quality["Noisy"] + 4
    cost = re.findall(r"^  (\S+) +([\d.]+) ms .*? ([\d.]+) MiB +loss ([\d.]+)", result.stdout, re.MULTILINE)
    (fused, _, fused_memory, fused_loss), (plain, _, plain_memory, plain_loss) = cost
    assert (fused, plain) == ("localattn", "F.unfold")
    assert float(fused_memory) < float(plain_memory)
    assert float(fused_loss) == pytest.approx(float(plain_loss), rel=1e-4)
    assert "loss" in result.stderr  # the progress bar
    assert "PSNR" in result.stderr
