"""How time and memory are measured: medians of interleaved rounds, and the resident set's high-water mark of a fresh
process."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

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
