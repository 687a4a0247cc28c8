"""``python -m localattn bench``: time and memory beside every other implementation that is installed.

Writes bench.md, bench.csv and bench.png. Calls of different implementations alternate in one process; memory is
measured in fresh processes. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import _library
from . import systems
from .measure import in_fresh_process, interleaved, matrix_product, multiply_add_peak, peak_memory
from .peers import PEERS, Peer, by_name
from .report import Results, write_report
from .shapes import KERNEL_SWEEP, QUICK_SHAPES, QUICK_SWEEP, SEEDS, SHAPES, SIDE_SWEEP, Shape

MM_SIZE = 2048


class Plan(NamedTuple):
    """How much is measured."""

    timed: list[Shape]  # every peer
    swept: list[Shape]  # for the plot, float32 only
    swept_peers: tuple[str, ...]
    weighed: list[Shape]  # memory
    weighed_peers: tuple[str, ...]
    seconds_each: float  # at most, for a peer's calls of one shape and pass
    rounds: int


FULL = Plan(
    SHAPES,
    [*KERNEL_SWEEP, *SIDE_SWEEP],
    ("localattn", "halo blocks", "compiled flex_attention", "unfold in chunks", "NATTEN"),
    [*SEEDS, Shape(1, 64, 128, 7), Shape(1, 64, 128, 15)],
    ("localattn", "halo blocks", "unfold in chunks", "unfold", "SDPA with a mask", "NATTEN"),
    seconds_each=6.0,
    rounds=30,
)
QUICK = Plan(
    QUICK_SHAPES,
    QUICK_SWEEP,
    ("localattn", "halo blocks", "unfold in chunks"),
    QUICK_SHAPES[:1],
    ("localattn", "unfold"),
    seconds_each=0.4,
    rounds=10,
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m localattn bench", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds: about two minutes")
    parser.add_argument("--output", type=Path, default=Path("localattn-bench"), help="directory (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="(default: torch's own choice)")
    parser.add_argument(
        "--systems", nargs="?", const="all", metavar="NAMES",
        help="instead, the published systems beside their plain PyTorch form; comma-separated names to keep, of: "
        + ", ".join(system.name for system in systems.SYSTEMS),
    )  # fmt: skip
    parser.add_argument("--peers", help="comma-separated names to keep, of: " + ", ".join(peer.name for peer in PEERS))
    arguments = parser.parse_args(argv)

    _library.require_operators()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.systems is not None:
        known = {system.name: system for system in systems.SYSTEMS}
        chosen = list(known) if arguments.systems == "all" else [n.strip() for n in arguments.systems.split(",")]
        if unknown := set(chosen) - set(known):
            parser.error(f"--systems: unknown {', '.join(sorted(unknown))}")
        pace = (0.4, 10) if arguments.quick else (6.0, 30)
        systems.run([known[name] for name in chosen], arguments.output, *pace)
        return
    names = [name.strip() for name in arguments.peers.split(",")] if arguments.peers else [p.name for p in PEERS]
    unknown = set(names) - {peer.name for peer in PEERS}
    if unknown:
        parser.error(f"--peers: unknown {', '.join(sorted(unknown))}")
    run(QUICK if arguments.quick else FULL, ["localattn", *(n for n in names if n != "localattn")], arguments.output)


def run(plan: Plan, names: list[str], output: Path) -> None:
    results = Results(threads=torch.get_num_threads(), peak=multiply_add_peak(torch.get_num_threads()))
    peers = []
    for peer in map(by_name, names):
        if (reason := peer.absent()) is not None:
            results.decline(peer.name, None, None, reason)
        else:
            peers.append(peer)
    passes = [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)]
    jobs = [(shape, *which) for shape in plan.timed for which in passes]
    jobs += [(shape, *which) for shape in plan.swept if shape not in plan.timed for which in passes[:2]]
    with tqdm(total=len(jobs) + len(plan.weighed), desc="bench", unit="shape") as bar:
        for shape, backward, dtype in jobs:
            taking = [peer for peer in peers if peer.reduced or dtype is torch.float32]
            if shape not in plan.timed:
                taking = [peer for peer in taking if peer.name in plan.swept_peers]
            _time(results, shape, backward, dtype, taking, plan, bar)
            bar.update()
        for shape in plan.weighed:
            for backward, peer in itertools.product((False, True), peers):
                if peer.name in plan.weighed_peers and peer.declines(shape, backward) is None:
                    bar.set_postfix_str(f"memory, {peer.name}, {shape}")
                    _weigh(results, shape, backward, peer)
            bar.update()
    write_report(results, output)
    print((output / "bench.md").read_text())
    print(f"Written to {output}: bench.md, bench.csv, bench.png")


def _time(
    results: Results, shape: Shape, backward: bool, dtype: torch.dtype, peers: list[Peer], plan: Plan, bar: tqdm
) -> None:
    mm = f"torch.mm {MM_SIZE}"
    calls: dict[str, Callable[[], Any]] = {mm: matrix_product(dtype, MM_SIZE)}
    calls[mm]()
    for peer in peers:
        if (reason := peer.declines(shape, backward)) is not None:
            results.decline(peer.name, shape, backward, reason)
            continue
        bar.set_postfix_str(f"preparing {peer.name}, {shape}")
        try:
            calls[peer.name] = _call(peer, shape, backward, dtype)
            calls[peer.name]()
        except Exception as error:  # whatever another package raises, the rest is still measured
            if peer.name == "localattn":
                raise
            calls.pop(peer.name, None)
            results.decline(peer.name, shape, backward, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    kind = f"{'forward and backward' if backward else 'forward'}, {str(dtype).removeprefix('torch.')}"
    timings = interleaved(
        calls, plan.seconds_each, plan.rounds, lambda name: bar.set_postfix_str(f"{name}, {shape}, {kind}")
    )
    rate = 2 * MM_SIZE**3 / timings.pop(mm).warm.median
    for name, timing in timings.items():
        results.time(name, shape, backward, dtype, timing, rate)


def _call(peer: Peer, shape: Shape, backward: bool, dtype: torch.dtype) -> Callable[[], Any]:
    tensors = _tensors(shape, dtype)
    attend = peer.prepare(shape)
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(*tensors)

        return forward
    grad_output = torch.randn_like(tensors[0])
    inputs = [x.requires_grad_() for x in tensors]
    return lambda: torch.autograd.grad(attend(*inputs), inputs, grad_output)


def _tensors(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (1, shape.side, shape.side, shape.heads, shape.channels)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(3)]


def _weigh(results: Results, shape: Shape, backward: bool, peer: Peer) -> None:
    try:
        results.weigh(
            peer.name, shape, backward, in_fresh_process(_memory, peer.name, shape, backward, results.threads)
        )
    except BrokenProcessPool:
        results.decline(peer.name, shape, backward, "was killed while its memory was measured")


def _memory(name: str, shape: Shape, backward: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    peer = by_name(name)
    _call(peer, Shape(shape.heads, shape.channels, 16, 3), backward, torch.float32)()  # loads what libraries load late
    call = _call(peer, shape, backward, torch.float32)
    return peak_memory(call)
