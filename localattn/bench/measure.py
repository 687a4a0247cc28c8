"""How time and memory are measured: medians of interleaved rounds, and the resident set's high-water mark of a fresh
process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


class Timing(NamedTuple):
    """Seconds of one call. Cold: after other work has filled the caches; warm: right after the cold call."""

    cold: Spread
    warm: Spread
    rounds: int


SLOW = 0.5  # seconds; beyond, the caches' state does not matter, and a warm call is not made


def interleaved(
    calls: Mapping[str, Callable[[], Any]], seconds_each: float, most_rounds: int, tick: Callable[[str], None]
) -> dict[str, Timing]:
    """Times the calls in rounds, one after the other in each, so that whatever else the machine does meets all alike.
    Each takes part until its time is spent, and in at least one round. What compiles or loads at its first call
    should have been called before."""
    cold: dict[str, list[float]] = {name: [] for name in calls}
    warm: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    evict = torch.zeros(16 * MIB)  # 64 MiB: more than the caches hold
    for _ in range(most_rounds):
        for name, call in calls.items():
            if cold[name] and spent[name] > seconds_each:
                continue
            evict.add_(1)
            tick(name)
            cold[name].append(_seconds(call))
            warm[name].append(_seconds(call) if cold[name][-1] < SLOW else cold[name][-1])
            spent[name] += cold[name][-1] + warm[name][-1]
    return {name: Timing(Spread.of(cold[name]), Spread.of(warm[name]), len(cold[name])) for name in calls}


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def multiply_add_peak(threads: int) -> float | None:
    """FLOP per second of that many threads doing nothing but float32 multiply-adds in registers: the best of several
    runs of peak.c, which the machine's C compiler builds for this machine. None if there is no compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "peak.so"
        source = Path(__file__).with_name("peak.c")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-std=gnu11", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        peak = ctypes.CDLL(str(library)).localattn_bench_peak
        peak.restype, peak.argtypes = ctypes.c_double, [ctypes.c_long]
        with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
            return max(sum(pool.map(peak, [2_000_000] * threads)) for _ in range(20))


def matrix_product(dtype: torch.dtype, size: int = 2048) -> Callable[[], Any]:
    """torch.mm of square matrices, the yardstick; size**3 * 2 FLOP."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes by which the resident set rose at its highest, above what it was when ``work`` began.

    Allocators keep freed memory, so call it in a process that has not done such work before:
    :func:`in_fresh_process`.
    """
    before = _status("VmRSS")
    if before is None:  # not Linux: the high-water mark since the process began is all there is
        before = _maximum_resident_set()
        work()
        return _maximum_resident_set() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    work()
    return _status("VmHWM") - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a new interpreter. Raises what it raised, BrokenProcessPool if it was killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _maximum_resident_set() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
