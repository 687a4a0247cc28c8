"""``python -m localattn bench --systems``: the published systems' modules beside the same systems in plain PyTorch
(:mod:`.plain_systems`), with the same parameters and inputs, in float32; forward, and forward and backward; time and
the rise of the resident set. For each, what this library sets out to reach, and whether it does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .. import nn, ops
from ..compat.image_local_attention_fork import f_similar, f_weighting
from . import plain_systems
from .measure import MIB, Timing, in_fresh_process, interleaved, matrix_product, peak_memory
from .peers import GIB, available_memory
from .report import conditions, milliseconds, table

OURS, PLAIN, UNFUSED = "localattn", "plain PyTorch", "localattn, unfused"
PASSES = {False: "forward", True: "forward+backward"}
MM_SIZE = 2048


class Form(NamedTuple):
    """One way to compute a system."""

    attend: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()
    needs: int = 0  # bytes, roughly: what would not fit is not run


class Goal(NamedTuple):
    """``form`` beside ``other``, in one pass: ``factor`` times as fast, or at most one ``factor``-th of its memory."""

    quantity: str  # "time" or "memory"
    backward: bool
    factor: float
    form: str = OURS
    other: str = PLAIN

    def __str__(self) -> str:
        much = f"at least {self.factor:g} x as fast as" if self.quantity == "time" else f"at most 1/{self.factor:g} of"
        return f"{PASSES[self.backward]}: {self.form} {much} {self.other}"


class Limit(NamedTuple):
    """The memory of localattn's forward stays below so many bytes."""

    most: int
    what: str

    def __str__(self) -> str:
        return f"forward: at most {self.most / MIB:.0f} MiB ({self.what})"


class System(NamedTuple):
    name: str
    setting: str
    make: Callable[[int], dict[str, Form]]  # from the side of the map
    side: int
    small_side: int  # of a first call, which loads what libraries load late
    goals: tuple[Goal | Limit, ...]


def _module_forms(module: torch.nn.Module, plain: Callable[[Tensor], Tensor], x: Tensor, needs: int = 0):
    parameters = tuple(module.parameters())
    return {OURS: Form(module, (x,), parameters), PLAIN: Form(plain, (x,), parameters, needs)}


def _halo(side: int) -> dict[str, Form]:
    module = nn.HaloAttn(256, num_heads=8, block_size=8, halo_size=3)
    return _module_forms(module, lambda x: plain_systems.halo_attention(module, x), torch.randn(2, 256, side, side))


def _routing(batch: int, dim: int, heads: int, n_win: int) -> Callable[[int], dict[str, Form]]:
    def make(side: int) -> dict[str, Form]:
        module = nn.BiLevelRoutingAttention(dim, heads, n_win=n_win, topk=4)
        matrix = 4 * batch * heads * side**2 * 4 * (side // n_win) ** 2  # float32, topk regions
        x = torch.randn(batch, side, side, dim)
        return _module_forms(module, lambda x: plain_systems.routing_attention(module, x), x, 3 * matrix)

    return make


def _routed_operator(dim: int, heads: int, n_win: int) -> Callable[[int], dict[str, Form]]:
    def make(side: int) -> dict[str, Form]:
        query, key, value = torch.randn(3, 1, side, side, heads, dim // heads)
        index = torch.rand(1, n_win**2, n_win**2).topk(4).indices
        return {OURS: Form(lambda *x: ops.routed_attention(*x, index, side // n_win), (query, key, value))}

    return make


def _block(side: int) -> dict[str, Form]:
    block = nn.Block(128).eval()
    plain = copy.deepcopy(block)
    plain.attn = plain_systems.PlainRouting(plain.attn)
    x = torch.randn(1, 128, side, side)
    return {
        OURS: Form(block, (x,), tuple(block.parameters())),
        PLAIN: Form(plain, (x,), tuple(plain.parameters())),
    }


def _efficient(heads: int) -> Callable[[int], dict[str, Form]]:
    def make(side: int) -> dict[str, Form]:
        module = nn.EfficientAttention(64, 32, heads, 64)
        x = torch.randn(1, 64, side, side)
        return _module_forms(module, lambda x: plain_systems.efficient_attention(module, x), x)

    return make


FINE, COARSE = (9, 5), (5, 5)


def fused_two_resolutions(query: Tensor, key: Tensor, value: Tensor, coarse_key: Tensor, coarse_value: Tensor):
    def heads_last(x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, H, W, 1, C), a view
        return x.permute(0, 2, 3, 1).unsqueeze(-2)

    query = heads_last(query)
    near = ops.local_attention(query, heads_last(key), heads_last(value), FINE, return_lse=True)
    far = ops.local_attention(query, heads_last(coarse_key), heads_last(coarse_value), COARSE, return_lse=True)
    output, _ = ops.merge_attentions([near[0], far[0]], [near[1], far[1]])
    return output.squeeze(-2).permute(0, 3, 1, 2)


def unfused_two_resolutions(query: Tensor, key: Tensor, value: Tensor, coarse_key: Tensor, coarse_value: Tensor):
    query = query * query.shape[1] ** -0.5
    scores = torch.cat((f_similar(query, key, *FINE), f_similar(query, coarse_key, *COARSE)), -1)
    near, far = scores.softmax(-1).split((math.prod(FINE), math.prod(COARSE)), -1)
    return f_weighting(value, near, *FINE) + f_weighting(coarse_value, far, *COARSE)


def _two_resolutions(side: int) -> dict[str, Form]:
    query, key, value = torch.randn(3, 16, 64, side, side)
    maps = (query, key, value, *torch.randn(2, 16, 64, side // 3, side // 3))
    return {
        OURS: Form(fused_two_resolutions, maps),
        UNFUSED: Form(unfused_two_resolutions, maps),
        PLAIN: Form(lambda *x: plain_systems.unfold_two_resolutions(*x, FINE, COARSE), maps),
    }


def _both(quantity: str, factor: float, **forms: str) -> tuple[Goal, Goal]:
    return Goal(quantity, False, factor, **forms), Goal(quantity, True, factor, **forms)


SYSTEMS = [
    System("halo", "HaloAttn: dim 256, heads 8, block 8, halo 3, B=2, 64²", _halo, 64, 16,
           (*_both("time", 5), *_both("memory", 6))),
    System("routing", "BiLevelRoutingAttention: dim 128, heads 4, n_win 7, topk 4, B=4, 56²",
           _routing(4, 128, 4, 7), 56, 14, (Goal("time", False, 4), Goal("time", True, 5))),
    System("routing-256", "BiLevelRoutingAttention: dim 64, heads 2, n_win 8, topk 4, B=1, 256²",
           _routing(1, 64, 2, 8), 256, 16, _both("time", 7)),
    System("routing-512", "BiLevelRoutingAttention: dim 64, heads 2, n_win 8, topk 4, B=1, 512²",
           _routing(1, 64, 2, 8), 512, 16, ()),
    System("routed-operator", "routed_attention alone: heads 2 of 32, 8 x 8 regions, topk 4, B=1, 256²",
           _routed_operator(64, 2, 8), 256, 16,
           (Limit(5 * 16 * MIB, "with query, key and value twice the bytes of all three and the output"),)),
    System("block", "Block(128), B=1, 28²", _block, 28, 14, _both("time", 1)),
    System("efficient-1", "EfficientAttention: in 64, key 32, value 64, 1 head, B=1, 256²", _efficient(1), 256, 16,
           (*_both("time", 1.6), Limit((8 + 8 + 16 + 16 + 8) * MIB, "q, k, v, output and 8 MiB"))),
    System("efficient-4", "EfficientAttention: in 64, key 32, value 64, 4 heads, B=1, 256²", _efficient(4), 256, 16,
           (*_both("time", 1.6), Limit((8 + 8 + 16 + 16 + 8) * MIB, "q, k, v, output and 8 MiB"))),
    System("two-resolutions", "CogView2's pattern: 16 heads of 64, 9x5 at 60² and 5x5 at 20² in one softmax",
           _two_resolutions, 60, 12,
           (*_both("time", 5, other=UNFUSED), *_both("time", 5, form=UNFUSED))),
]  # fmt: skip


@dataclass
class Measurements:
    threads: int
    times: dict[tuple[str, str, bool], Timing] = field(default_factory=dict)  # system, form, backward
    memory: dict[tuple[str, str, bool], int] = field(default_factory=dict)
    mm: dict[str, float] = field(default_factory=dict)  # FLOP/s of torch.mm in a system's rounds
    declined: list[str] = field(default_factory=list)

    def reached(self, system: System, goal: Goal | Limit) -> tuple[str, bool] | None:
        """What was measured, and whether that is the goal; None if it was not measured."""
        if isinstance(goal, Limit):
            size = self.memory.get((system.name, OURS, False))
            return None if size is None else (f"{size / MIB:.0f} MiB", size <= goal.most)
        ours, other = (system.name, goal.form, goal.backward), (system.name, goal.other, goal.backward)
        if goal.quantity == "time":
            if ours not in self.times or other not in self.times:
                return None
            factor = self.times[other].warm.median / self.times[ours].warm.median
            return f"{factor:.1f} x", factor >= goal.factor
        if ours not in self.memory or other not in self.memory:
            return None
        factor = self.memory[other] / self.memory[ours]
        return f"1/{factor:.1f}", factor >= goal.factor


def run(systems: list[System], output: Path, seconds_each: float = 6.0, rounds: int = 30) -> None:
    measured = Measurements(torch.get_num_threads())
    with tqdm(total=4 * len(systems), desc="bench", unit="measurement") as bar:
        for system in systems:
            for backward in PASSES:
                _time(measured, system, backward, seconds_each, rounds, bar)
                bar.update()
            for backward in PASSES:
                _weigh(measured, system, backward, bar)
                bar.update()
    output.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(_markdown(systems, measured)) + "\n"
    (output / "systems.md").write_text(text)
    print(text)
    print(f"Written to {output / 'systems.md'}")


def _forms(system: System, side: int) -> dict[str, Form]:
    torch.manual_seed(0)
    return system.make(side)


def _declines(form: Form) -> str | None:
    there = available_memory()
    if form.needs > there * 0.8:
        return f"needs about {form.needs / GIB:.0f} GiB, {there / GIB:.0f} GiB are free"
    return None


def _call(form: Form, backward: bool) -> Callable[[], Any]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return form.attend(*form.inputs)

        return forward
    inputs = [x.requires_grad_() for x in form.inputs]
    grad_output = torch.randn(form.inputs[0].shape)  # every system's output has its first input's shape
    return lambda: torch.autograd.grad(form.attend(*inputs), [*inputs, *form.parameters], grad_output)


def _time(measured: Measurements, system: System, backward: bool, seconds_each: float, rounds: int, bar: tqdm) -> None:
    mm = f"torch.mm {MM_SIZE}"
    calls: dict[str, Callable[[], Any]] = {mm: matrix_product(torch.float32, MM_SIZE)}
    for name, form in _forms(system, system.side).items():
        if (reason := _declines(form)) is not None:
            measured.declined.append(f"{system.setting}, {PASSES[backward]}: {name} {reason}")
            continue
        bar.set_postfix_str(f"preparing {name}, {system.name}")
        calls[name] = _call(form, backward)
        calls[name]()
    timings = interleaved(
        calls, seconds_each, rounds, lambda name: bar.set_postfix_str(f"{name}, {system.name}, {PASSES[backward]}")
    )
    measured.mm[f"{system.setting}, {PASSES[backward]}"] = 2 * MM_SIZE**3 / timings.pop(mm).warm.median
    for name, timing in timings.items():
        measured.times[system.name, name, backward] = timing


def _weigh(measured: Measurements, system: System, backward: bool, bar: tqdm) -> None:
    for name, form in _forms(system, system.side).items():
        if _declines(form) is not None:
            continue
        bar.set_postfix_str(f"memory, {name}, {system.name}, {PASSES[backward]}")
        try:
            size = in_fresh_process(_memory, system.name, name, backward, measured.threads)
        except BrokenProcessPool:
            measured.declined.append(f"{system.setting}, {PASSES[backward]}: {name} was killed at its memory's measure")
        else:
            measured.memory[system.name, name, backward] = size


def _memory(system_name: str, form: str, backward: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    system = next(system for system in SYSTEMS if system.name == system_name)
    _call(_forms(system, system.small_side)[form], backward)()
    return peak_memory(_call(_forms(system, system.side)[form], backward))


def _markdown(systems: list[System], measured: Measurements) -> Iterable[str]:
    yield "# localattn bench --systems"
    yield conditions(measured.threads)
    rates = sorted(measured.mm.values())
    yield (
        "Times are medians of interleaved rounds, in brackets the quartiles, in ms; memory is the rise of the resident "
        "set during the call, results included, in MiB, each in a fresh process. torch.mm of 2048² in the same rounds: "
        f"{rates[0] / 1e9:.0f} to {rates[-1] / 1e9:.0f} GFLOP/s."
    )
    rows = []
    for system in systems:
        for form in (OURS, UNFUSED, PLAIN):
            timings = [measured.times.get((system.name, form, backward)) for backward in PASSES]
            sizes = [measured.memory.get((system.name, form, backward)) for backward in PASSES]
            if any(timings):
                cells = ["-" if timing is None else milliseconds(timing.warm) for timing in timings]
                cells += ["-" if size is None else f"{size / MIB:.0f}" for size in sizes]
                rows.append([system.setting, form, *cells])
    yield table(["system", "computed by", *PASSES.values(), *(f"memory, {which}" for which in PASSES.values())], rows)
    rows = []
    for system in systems:
        for goal in system.goals:
            if (found := measured.reached(system, goal)) is not None:
                rows.append([system.setting, str(goal), found[0], "yes" if found[1] else "no"])
    yield "## What was set out to reach"
    yield table(["system", "goal", "measured", "holds"], rows)
    if measured.declined:
        yield "## Not measured"
        yield "\n".join(f"- {line}" for line in dict.fromkeys(measured.declined))
