#!/usr/bin/env python3
"""Reads the machine code in liblocalattn_cuda.so and fails on what would make the fast kernels slow.

    check_machine_code.py LIBRARY [--cuobjdump PATH] [--table]

Fast kernels may use no local memory (spilled registers live there) and must hold the instructions they are built
around, on every architecture they are compiled for: asynchronous copies from sm_80 on. The disassembler is
NVIDIA's cuobjdump, as found by --cuobjdump, on PATH, or in the installed packages nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm. --table prints registers and instruction counts of the fast kernels.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

# Kernel -> instructions it must hold: product, load from shared memory, asynchronous copy.
PIPELINE = ("HMMA", "LDSM", "LDGSTS")
FAST = {f"tensor_core_{name}": PIPELINE for name in ("forward", "grad_query", "grad_key")}
FAST |= {f"tensor_core_routed_{name}": PIPELINE for name in ("forward", "grad_query", "grad_key")}
FAST |= {
    name: ("FFMA", "LDS", "LDGSTS")
    for name in ("simt_forward", "simt_grad_query", "simt_grad_key", "simt_window_product")
}


def find_cuobjdump(given):
    if given:
        return given
    found = shutil.which("cuobjdump")
    if found:
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-cuobjdump"):
            if file.name == "cuobjdump":
                return str(file.locate())
    sys.exit(
        "cuobjdump was not found: name it with --cuobjdump, or install the CUDA toolkit's, or the packages "
        "nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm"
    )


def dump(tool, library, *flags):
    """The lines that the tool writes; nvdisasm, which it calls, lies beside it."""
    path = f"{pathlib.Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with subprocess.Popen(
        [tool, *flags, library], stdout=subprocess.PIPE, text=True, env={**os.environ, "PATH": path}
    ) as run:
        yield from run.stdout
    if run.returncode:
        sys.exit(f"{tool} {' '.join(flags)} {library} failed with status {run.returncode}")


def resources(lines):
    """{(architecture, function): (registers, bytes of local memory)}"""
    found, architecture = {}, None
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found[architecture, function] = int(match[1]), int(match[2]) + int(match[3])
    return found


def instructions(lines):
    """{(architecture, function): [instruction with its operands]}"""
    found, architecture = collections.defaultdict(list), None
    for line in lines:
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            function = match[1]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_][^;]*)", line):
            found[architecture, function].append(match[2])
    return found


def loops(code):
    """[(first, last)] instructions of what ends in a branch back; instructions are 16 bytes long."""
    targets = [(re.search(r"0x([0-9a-f]+)", text), i) for i, text in enumerate(code) if text.startswith("BRA")]
    return [(int(to[1], 16) // 16, i) for to, i in targets if to and int(to[1], 16) // 16 < i]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--cuobjdump")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    tool = find_cuobjdump(arguments.cuobjdump)
    usage = resources(dump(tool, arguments.library, "-res-usage"))
    code = instructions(dump(tool, arguments.library, "-sass"))

    wrong, seen = [], collections.Counter()
    for (architecture, function), (registers, local) in sorted(usage.items()):
        kernel = next((name for name in FAST if name in function), None)
        if local:
            text = f"{architecture} {function}: {local} bytes of local memory"
            wrong.append(text) if kernel else print("generic:", text)
        if not kernel:
            continue
        seen[kernel, architecture] += 1
        counts = collections.Counter(re.match(r"[A-Z0-9_]+", text)[0] for text in code[architecture, function])
        if arguments.table:
            listed = " ".join(f"{name} {counts[name]}" for name in FAST[kernel])
            print(f"{architecture} {registers:3} registers, {sum(counts.values())} instructions, {listed}: {function}")
        # 16-bit floats are widened on their way into shared memory where there are no tensor cores.
        copies = int(architecture[3:]) >= 80 and not (kernel.startswith("simt") and "float16" in function)
        expected = [name for name in FAST[kernel] if name != "LDGSTS" or copies]
        wrong += [f"{architecture} {function}: no {name}" for name in expected if not counts[name]]
    for architecture in sorted({a for a, _ in usage}):
        needed = [kernel for kernel in FAST if "HMMA" not in FAST[kernel] or int(architecture[3:]) >= 80]
        wrong += [
            f"{architecture}: {kernel} is not in the library" for kernel in needed if not seen[kernel, architecture]
        ]
    for line in wrong:
        print("FAIL", line)
    print(f"{sum(seen.values())} fast kernels on {len({a for a, _ in usage})} architectures, {len(wrong)} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
