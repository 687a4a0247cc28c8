"""``python -m localattn bench``: what it measures is right, and what it writes holds what it measured."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch

import localattn
from localattn.bench import Plan, run, systems
from localattn.bench.measure import MIB, in_fresh_process, interleaved, multiply_add_peak, peak_memory
from localattn.bench.peers import PEERS, Peer, by_name
from localattn.bench.shapes import Shape


# NATTEN's border is another one, and it is a project of its own.
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.name != "NATTEN"], ids=lambda peer: peer.name)
def test_peers_compute_the_same(peer: Peer) -> None:
    shape = Shape(2, 8, 24, 7)
    if peer.name == "compiled flex_attention":
        if torch.__version__.startswith("2.4."):
            pytest.skip(f"{peer.name}: {peer.absent()}")
        torch.use_deterministic_algorithms(False)  # the compiler's own scratch memory
    assert peer.absent() is None
    query, key, value = torch.randn(3, 1, shape.side, shape.side, shape.heads, shape.channels, dtype=torch.float32)
    expected = localattn.reference.local_attention(query, key, value, shape.kernel)
    with torch.no_grad():
        torch.testing.assert_close(peer.prepare(shape)(query, key, value), expected, rtol=1e-5, atol=1e-5)


def test_pairs_are_counted_inside_the_map() -> None:
    shape = Shape(3, 8, 6, 5)
    windows = localattn.reference.axis_windows(6, 6, 5, 1, 1, False, "mask", torch.device("cpu"))
    assert shape.pairs == 3 * int(windows.inside.sum()) ** 2
    assert shape.flop(backward=False) == 4 * 8 * shape.pairs


def _touch(size: int) -> None:
    block = bytearray(size)
    for at in range(0, size, 4096):
        block[at] = 1


def _memory_of_touching(size: int) -> int:
    return peak_memory(lambda: _touch(size))


def test_peak_memory_sees_what_is_freed_again() -> None:
    assert in_fresh_process(_memory_of_touching, 64 * MIB) == pytest.approx(64 * MIB, abs=4 * MIB)


def test_interleaved_measures_each_call() -> None:
    ticks = []
    timings = interleaved({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.05)}, 0.2, 4, ticks.append)
    assert 0.002 <= timings["short"].warm.median < 0.05 <= timings["long"].warm.median
    assert ticks[:4] == ["short", "long", "short", "long"]
    assert timings["long"].rounds < timings["short"].rounds == 4


def test_multiply_add_peak_is_above_what_a_product_reaches() -> None:
    peak = multiply_add_peak(1)
    assert peak is not None
    assert 1e9 < peak < 1e12


def test_report_holds_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = Shape(1, 16, 16, 5)
    torch.use_deterministic_algorithms(False)
    peers = ("localattn", "halo blocks", "unfold")
    run(Plan([shape], [], (), [shape], peers, seconds_each=0.05, rounds=2), list(peers), tmp_path)
    rows = list(csv.DictReader((tmp_path / "bench.csv").open()))
    measured = {(row["peer"], row["pass"], row["dtype"]) for row in rows}
    both = [("localattn", "bfloat16"), *((peer, "float32") for peer in peers)]
    assert measured == {(peer, which, dtype) for peer, dtype in both for which in ("forward", "forward+backward")}
    assert all(float(row["warm_s"]) > 0 for row in rows)
    peaks = {(row["peer"], row["pass"]): int(row["peak_bytes"]) for row in rows if row["dtype"] == "float32"}
    assert min(peaks.values()) >= 0  # the others' may fit into pages that were there already
    assert peaks["unfold", "forward"] > 5 * 5 * 4 * 16 * 16 * 16  # bytes of the keys, unfolded
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert "GFLOP/s" in text
    assert "halo blocks" in text


def test_a_peer_that_would_not_fit_is_declined() -> None:
    reason = by_name("unfold").declines(Shape(64, 64, 2048, 21), True)
    assert reason is not None
    assert "GiB" in reason


SMALLEST_SIDES = {"halo": 24, "routing": 14, "block": 14, "two-resolutions": 12}  # with neighbours in every direction


@pytest.mark.parametrize("system", systems.SYSTEMS, ids=lambda system: system.name)
def test_plain_systems_compute_the_same(system: systems.System) -> None:
    forms = system.make(SMALLEST_SIDES.get(system.name, 16))
    inputs = [x.requires_grad_() for x in forms[systems.OURS].inputs]
    grad_output = torch.randn(inputs[0].shape)
    expected: list[torch.Tensor] | None = None
    for form in forms.values():
        output = form.attend(*inputs)
        results = [output, *torch.autograd.grad(output, [*inputs, *form.parameters], grad_output)]
        expected = results if expected is None else expected
        for got, e in zip(results, expected, strict=True):
            torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4 * max(1.0, e.abs().max().item()))


def test_report_of_systems_holds_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goals = (systems.Goal("time", False, 1e-6), systems.Goal("memory", True, 1e6), systems.Limit(1 << 40, "everything"))
    block = next(system for system in systems.SYSTEMS if system.name == "block")
    systems.run([block._replace(side=14, goals=goals)], tmp_path, seconds_each=0.05, rounds=2)
    text = (tmp_path / "systems.md").read_text()
    assert text in capsys.readouterr().out
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| Block")]
    assert [line[1] for line in lines[:2]] == [systems.OURS, systems.PLAIN]
    assert all(float(cell.split()[0]) > 0 for line in lines[:2] for cell in line[2:4])
    assert [line[-1].removesuffix(" |") for line in lines[2:]] == ["yes", "no", "yes"]
