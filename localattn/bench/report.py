"""What was measured, as Markdown, CSV and a plot."""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .. import _library
from .._info import processor
from .measure import MIB, Timing
from .shapes import KERNEL_SWEEP, SEEDS, SIDE_SWEEP, Shape

ABSENT = "-"
Key = tuple[str, Shape, bool]  # peer, shape, backward


class Measured(NamedTuple):
    timing: Timing
    mm_rate: float  # FLOP/s of torch.mm in the same rounds


@dataclass
class Results:
    threads: int
    peak: float | None  # FLOP/s of float32 multiply-adds
    times: dict[tuple[str, Shape, bool, torch.dtype], Measured] = field(default_factory=dict)
    memory: dict[Key, int] = field(default_factory=dict)  # bytes beyond what was there before the call
    declined: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # (peer, reason): where

    def time(self, peer: str, shape: Shape, backward: bool, dtype: torch.dtype, timing: Timing, mm_rate: float) -> None:
        self.times[peer, shape, backward, dtype] = Measured(timing, mm_rate)

    def weigh(self, peer: str, shape: Shape, backward: bool, size: int) -> None:
        self.memory[peer, shape, backward] = size

    def decline(self, peer: str, shape: Shape | None, backward: bool | None, reason: str) -> None:
        where = "everywhere" if shape is None else f"{shape}{', backward' if backward else ''}"
        places = self.declined.setdefault((peer, reason), [])
        if where not in places:
            places.append(where)

    def median(self, peer: str, shape: Shape, backward: bool, dtype: torch.dtype = torch.float32) -> float | None:
        """Seconds, warm."""
        measured = self.times.get((peer, shape, backward, dtype))
        return None if measured is None else measured.timing.warm.median

    def peers(self) -> list[str]:
        return list(dict.fromkeys(key[0] for key in self.times))

    def shapes(self) -> list[Shape]:
        """Those that more than a sweep's peers were timed on, in the order of measurement."""
        return list(dict.fromkeys(key[1] for key in self.times if key[3] is torch.bfloat16))


def write_report(results: Results, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "bench.md").write_text(_markdown(results))
    _write_csv(results, directory / "bench.csv")
    _plot(results, directory / "bench.png")


# ---- Markdown --------------------------------------------------------------------------------------------------------


def _markdown(results: Results) -> str:
    sections = [
        "# localattn bench",
        _conditions(results),
        *_seeds(results),
        *_own(results),
        *_against_peers(results, backward=False),
        *_against_peers(results, backward=True),
        *_memory(results),
        *_declined(results),
    ]
    return "\n\n".join(sections) + "\n"


def conditions(threads: int) -> str:
    runnable = [v.name for v in _library.variants() if v.device == "cpu" and v.unavailable is None]
    return (
        f"{processor()}; threads: {threads}; {platform.system()} {platform.release()}; torch {torch.__version__}; "
        f"localattn {_library.version()}, best variant {runnable[0]}."
    )


def _conditions(results: Results) -> str:
    peak = "not measured: no C compiler" if results.peak is None else f"{results.peak / 1e9:.0f} GFLOP/s"
    return (
        f"{conditions(results.threads)}\n\n"
        f"float32 multiply-add peak of these threads, measured: {peak}. Times are medians of interleaved rounds (in "
        "brackets the quartiles), warm (right after the same call) unless called cold (after 64 MiB of other memory "
        "were written); results are allocated inside. FLOP counts pairs inside the map only: 4 x channels forward, "
        '14 x channels forward and backward. Shapes are heads x channels, side², kernel; batch 1, border "mask".'
    )


def _seeds(results: Results) -> Iterable[str]:
    rows = []
    for shape in SEEDS:
        cells = []
        for backward in (False, True):
            for quantity in (results.memory.get, lambda key: results.median(*key)):
                ours, plain = (quantity((peer, shape, backward)) for peer in ("localattn", "unfold"))
                cells.append(f"{100 * ours / plain:.2g}%" if ours is not None and plain else ABSENT)
        if set(cells) != {ABSENT}:
            rows.append([str(shape.kernel), *cells])
    if rows:
        yield "## Relative to plain unfold (H = W = 128, 64 channels)"
        yield table(["k", "forward memory", "forward time", "forward+backward memory", "forward+backward time"], rows)


def _own(results: Results) -> Iterable[str]:
    rows = []
    for shape in results.shapes():
        row = [str(shape)]
        for backward, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16),
                                (True, torch.bfloat16)):  # fmt: skip
            measured = results.times.get(("localattn", shape, backward, dtype))
            if measured is None:
                row += [ABSENT] * (4 if (backward, dtype) == (False, torch.float32) else 2)
                continue
            rate = shape.flop(backward) / measured.timing.warm.median
            row.append(milliseconds(measured.timing.warm))
            if not backward and dtype is torch.float32:
                row.append(f"{1e3 * measured.timing.cold.median:.3g}")
                row.append(ABSENT if results.peak is None else f"{100 * rate / results.peak:.0f}%")
            row.append(f"{rate / measured.mm_rate:.2f}")
        rows.append(row)
    yield "## localattn.local_attention"
    yield table(
        ["shape", "forward, ms", "cold, ms", "of peak", "x torch.mm", "forward+backward, ms", "x torch.mm",
         "bf16 forward, ms", "x bf16 torch.mm", "bf16 forward+backward, ms", "x bf16 torch.mm"],
        rows,
    )  # fmt: skip


def _against_peers(results: Results, backward: bool) -> Iterable[str]:
    others = [peer for peer in results.peers() if peer != "localattn"]
    rows = []
    for shape in results.shapes():
        ours = results.median("localattn", shape, backward)
        if ours is None:
            continue
        row = [str(shape), f"{1e3 * ours:.3g}"]
        for peer in others:
            theirs = results.median(peer, shape, backward)
            row.append(ABSENT if theirs is None else f"{1e3 * theirs:.3g} ({theirs / ours:.1f}x)")
        rows.append(row)
    if rows and others:
        yield f"## {'Forward and backward' if backward else 'Forward'}, float32, ms (times localattn's)"
        yield table(["shape", "localattn", *others], rows)


def _memory(results: Results) -> Iterable[str]:
    peers = list(dict.fromkeys(key[0] for key in results.memory))
    rows = []
    for shape, backward in dict.fromkeys((key[1], key[2]) for key in results.memory):
        sizes = (results.memory.get((peer, shape, backward)) for peer in peers)
        cells = [ABSENT if size is None else f"{size / MIB:.0f}" for size in sizes]
        rows.append([f"{shape}{', backward too' if backward else ''}", *cells])
    if rows:
        yield "## Peak memory, MiB"
        yield "The rise of the resident set during the call, results included, each in a fresh process."
        yield table(["shape", *peers], sorted(rows))


def _declined(results: Results) -> Iterable[str]:
    if results.declined:
        yield "## Not measured"
        yield "\n".join(
            f"- {peer}: {reason} ({'; '.join(places)})" for (peer, reason), places in results.declined.items()
        )


def milliseconds(spread) -> str:
    return f"{1e3 * spread.median:.3g} [{1e3 * spread.low:.3g}, {1e3 * spread.high:.3g}]"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- CSV and plot ----------------------------------------------------------------------------------------------------


def _write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["peer", "heads", "channels", "side", "kernel", "pass", "dtype", "warm_s", "warm_low_s", "warm_high_s",
             "cold_s", "rounds", "useful_flop", "torch_mm_flop_per_s", "peak_bytes"]
        )  # fmt: skip
        for (peer, shape, backward, dtype), (timing, mm_rate) in results.times.items():
            memory = results.memory.get((peer, shape, backward), "") if dtype is torch.float32 else ""
            writer.writerow(
                [peer, *shape, "forward+backward" if backward else "forward", str(dtype).removeprefix("torch."),
                 *timing.warm, timing.cold.median, timing.rounds, shape.flop(backward), mm_rate, memory]
            )  # fmt: skip


def _plot(results: Results, path: Path) -> None:
    figure = Figure(figsize=(15, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    time, memory, pixels = figure.subplots(1, 3)
    peers = results.peers()
    heads, channels, side, _ = KERNEL_SWEEP[0]

    def same_map(shape: Shape) -> bool:
        return shape[:3] == (heads, channels, side)

    def line(axis, quantity: Callable[[str, Shape], float | None], shapes: list[Shape], x) -> None:
        for index, peer in enumerate(peers):
            points = sorted((x(shape), y) for shape in shapes if (y := quantity(peer, shape)) is not None)
            if points:
                width = 3 if peer == "localattn" else 1.5
                axis.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=peer, linewidth=width)

    timed = list(dict.fromkeys(key[1] for key in results.times))
    weighed = list(dict.fromkeys(key[1] for key in results.memory))
    line(time, lambda peer, shape: _scaled(results.median(peer, shape, False), 1e3),
         [s for s in timed if same_map(s)], lambda shape: shape.kernel)  # fmt: skip
    line(memory, lambda peer, shape: _scaled(results.memory.get((peer, shape, True)), 1 / MIB),
         [s for s in weighed if same_map(s)], lambda shape: shape.kernel)  # fmt: skip
    sweep = SIDE_SWEEP[0]
    line(pixels, lambda peer, shape: _scaled(results.median(peer, shape, True), 1e3),
         [s for s in timed if (s.heads, s.channels, s.kernel) == (sweep.heads, sweep.channels, sweep.kernel)],
         lambda shape: shape.side**2)  # fmt: skip

    time.set(title=f"Forward, {side} x {side}, {channels} channels", xlabel="kernel size", ylabel="ms")
    memory.set(title="Forward and backward, peak memory", xlabel="kernel size", ylabel="MiB")
    pixels.set(title=f"Forward and backward, {sweep.heads} heads of {sweep.channels}, k = {sweep.kernel}",
               xlabel="pixels", ylabel="ms", xscale="log")  # fmt: skip
    for axis in (time, memory, pixels):
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = next((found for axis in (time, pixels, memory) if (found := axis.get_legend_handles_labels())[0]),
                           ([], []))  # fmt: skip
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), frameon=False, fontsize=9)
    figure.suptitle(f"{processor()}, threads: {results.threads}, float32", fontsize=11, color="#444444")
    figure.savefig(path)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
