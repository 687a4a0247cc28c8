#!/usr/bin/env python3
"""Prints the predictions of core/src/cuda/README.md, from the machine code of liblocalattn_cuda.so for sm_90.

    predict.py LIBRARY [--cuobjdump PATH]

A kernel's time is that of what it needs most of, on an H200: instructions issued, fused multiply-adds of mma.sync,
bytes from shared memory, from the second-level cache, and of device memory, over an efficiency; rounded up to whole
turns of blocks over the multiprocessors. Instructions are counted in the loops of the machine code, each as long as it
is listed, jumped-over parts included but for products of chunks that a patch does not see; how often a loop runs
follows from the window rule and the tiles (core/src/cuda/arch/*_tile_table.h), which are repeated here.
"""

import argparse
import dataclasses
import math

import check_machine_code as machine

from localattn.reference import axis_windows

MULTIPROCESSORS, CLOCK, COPY, FLOAT32_RATE = 132, 1.755e9, 4.3e12, 67e12
A_CLOCK = {"mma": 1024, "issue": 4, "shared": 128, "cache": 32}  # of one multiprocessor
EFFICIENCY, LAUNCH = 0.6, 2e-6
SHARED_LIMIT, REGISTERS = 227 << 10, 65536


@dataclasses.dataclass
class Case:
    batch: int
    heads: int
    channels: int
    side: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    border: str = "mask"

    def windows(self):
        """By class of the dilation, the keys that each query of an axis sees: (begin, end) in the class."""
        rule = (self.kernel, self.stride, self.dilation, self.causal, self.border)
        window = axis_windows(self.side, self.side, *rule, device="cpu")
        place = window.position // self.dilation
        there = window.inside | window.outside if self.border == "zero" else window.inside
        classes = []
        for residue in range(self.dilation):
            mine = slice(residue, None, self.dilation)
            seen = [keys[present] for keys, present in zip(place[mine], there[mine])]
            classes.append([(int(keys[0]), int(keys[-1]) + 1) for keys in seen])
        return classes

    def pairs(self):
        inside = [min(e, len(c)) - max(b, 0) for c in self.windows() for b, e in c]
        return sum(inside) ** 2 * self.batch * self.heads

    def elements(self):
        return self.batch * self.heads * self.channels * self.side**2


def transposed(classes):
    """By class, the queries that see each key."""
    found = []
    for windows in classes:
        n = len(windows)
        firsts = [next((q for q in range(n) if windows[q][1] > key), n) for key in range(n)]
        ends = [next((q for q in range(n) if windows[q][0] > key), n) for key in range(n)]
        found.append([(f, max(e, f)) for f, e in zip(firsts, ends)])
    return found


@dataclasses.dataclass
class Tile:
    """Places of a block: `rows` x `columns`, of a warp `warp_rows` x `warp_columns`; streamed columns of a step."""

    rows: int
    columns: int
    warp_rows: int
    warp_columns: int
    step: int
    stage_rows: int
    spare: int
    width: int
    element: int  # bytes
    tensors: int = 2  # that stream
    strip: int = 0  # places that share a step, where a warp holds several strips
    patches: int = 1  # whose products are skipped, chunk by chunk of 4 columns, where they see nothing

    @property
    def warps(self):
        return self.rows // self.warp_rows * (self.columns // self.warp_columns)

    @property
    def slot_bytes(self):
        return self.width * self.element


def along_rows(tile, classes):
    """Tiles, stages, and stages that a warp has work in, summed over an axis."""
    tiles = stages = visits = 0
    for seen in classes:
        for first in range(0, len(seen), tile.rows):
            part = seen[first : first + tile.rows]
            begin, count = part[0][0], -(-(part[-1][1] - part[0][0]) // tile.stage_rows)
            tiles, stages = tiles + 1, stages + count
            for row in range(0, len(part), tile.warp_rows):
                mine = part[row : row + tile.warp_rows]
                low, high = mine[0][0] - begin, mine[-1][1] - begin
                visits += max(0, -(-high // tile.stage_rows) - low // tile.stage_rows)
    return tiles, stages, visits


def along_columns(tile, classes):
    """Tiles, streamed columns, steps of a warp, and the share of their products that is computed, summed over an axis;
    and the most columns of a stage."""
    tiles = columns = steps = most = computed = 0
    for seen in classes:
        for first in range(0, len(seen), tile.columns):
            part = seen[first : first + tile.columns]
            count = part[-1][1] - part[0][0] + tile.spare
            tiles, columns, most = tiles + 1, columns + count, max(most, count)
            for column in range(0, len(part), tile.warp_columns):
                mine = part[column : column + tile.warp_columns]
                strips = [mine[i : i + tile.strip] for i in range(0, len(mine), tile.strip)] if tile.strip else [mine]
                of_warp = max(-(-(s[-1][1] - s[0][0]) // tile.step) for s in strips)
                steps += of_warp
                if tile.strip:
                    computed += of_warp
                    continue
                patches = [mine[i : i + 4] for i in range(0, len(mine), 4)]
                chunks = sum(-(-(p[-1][1] - mine[0][0]) // 4) - (p[0][0] - mine[0][0]) // 4 for p in patches)
                computed += chunks / (tile.patches * tile.step / 4)
    return tiles, columns, steps, computed, most


def shared_bytes_of(operation):
    opcode = operation.split()[0]
    if opcode.startswith("LDSM"):
        return 512
    if not opcode.startswith("LDS") or opcode.startswith("LDGSTS"):
        return 0
    return 512 if ".128" in opcode else 256 if ".64" in opcode else 128


class Kernel:
    """What the machine code of a kernel says: instructions of its loops."""

    listed = 1  # a step is so many times what the inner loop lists

    def __init__(self, code, usage, parts, biased, product):
        fitting = [f for a, f in code if a == "sm_90" and all(part in f for part in parts)]
        (function,) = [f for f in fitting if ("ScoreBias" in f) == biased]
        self.registers, self.local = usage["sm_90", function]
        self.code = code["sm_90", function]
        loops = machine.loops(self.code)

        def smallest(*opcodes, within=None, without=()):
            fitting = [
                (end - begin, begin, end)
                for begin, end in loops
                if (within is None or (within[0] <= begin and end <= within[1]))
                and all(self.count(begin, end, o) for o in opcodes)
                and not any(self.count(begin, end, o) for o in without)
            ]
            return min(fitting)[1:] if fitting else None

        self.inner = smallest(product)
        self.stage = smallest(product, "BAR")
        copy = "LDGSTS" if smallest("LDGSTS", within=self.stage) else "STS"
        copying = [loop for loop in loops if self.count(*loop, copy) and not self.count(*loop, product)]
        # Where the loop of the copies is no loop of its own any more: as elsewhere.
        self.a_copy = min((self.count(*loop) / self.count(*loop, copy) for loop in copying), default=18)
        self.loaders = [loop for loop in copying if self.stage[0] <= loop[0] and loop[1] <= self.stage[1]]

    def count(self, begin, end, opcode=""):
        return sum(o.split()[0].split(".")[0] in (opcode, "") or not opcode for o in self.code[begin : end + 1])

    def work(self, tile, rows, columns, images, parts=1):
        """What all blocks need, by resource, and how many blocks there are."""
        row_tiles, stages, visits = along_rows(tile, rows)
        column_tiles, streamed, steps, computed, most = along_columns(tile, columns)
        blocks, warps = row_tiles * column_tiles * images, tile.warps
        steps, computed = steps * visits * images, computed * visits * images
        slots = stages * streamed * tile.stage_rows * images
        inner, stage, products = self.count(*self.inner), self.count(*self.stage), self.count(*self.inner, "HMMA")
        others = sum(self.count(*loop) for loop in self.loaders)
        copies = slots * tile.slot_bytes / 16 / 32  # of a warp, each of every tensor
        step_bytes = sum(shared_bytes_of(o) for o in self.code[self.inner[0] : self.inner[1] + 1])
        issued = (
            blocks * warps * (len(self.code) - stage)
            + stages * column_tiles * images * warps * max(stage - inner - others, 0)
            + copies * tile.tensors * self.a_copy
            + self.listed * (steps * (inner - products) + computed * products)
        )
        streamed_bytes = slots * tile.slot_bytes * tile.tensors
        self.blocks = blocks * parts
        self.shared_bytes = 2 * most * tile.tensors * tile.stage_rows * tile.slot_bytes
        need = {
            "mma": self.listed * computed * products * 2048,
            "issue": issued,
            "shared": self.listed * steps * step_bytes + streamed_bytes,
            "cache": streamed_bytes,
        }
        return {name: parts * amount for name, amount in need.items()}

    def warps_resident(self, tile):
        registers = -(-self.registers // 8) * 8 * 32 * tile.warps
        return min(REGISTERS // registers, SHARED_LIMIT // (self.shared_bytes + 1024), 32) * tile.warps


def seconds(need, blocks):
    """By resource."""
    turns = math.ceil(blocks / MULTIPROCESSORS) * MULTIPROCESSORS / blocks
    return {name: turns * amount / A_CLOCK[name] / MULTIPROCESSORS / CLOCK for name, amount in need.items()}


def tensor_core_tiles(case):
    """[kernel's name, pattern of its function, tile, parts] of the forward and of the backward."""
    width = next(w for w in (32, 64, 128, 256) if case.channels <= w)
    small = width <= 64 and case.kernel + case.stride <= 9
    rows = 1 if small else 2
    tiles = f"TilesILi{width}ELb{int(small)}E"

    def tile(warps, patches, group):
        columns = 4 * patches * warps // rows
        return Tile(4 * rows, columns, 4, 4 * patches, 4 * group, 4, 3, width, 2, patches=patches)

    patches, gradient_patches = (2 if width <= 64 else 1), (2 if width == 32 else 1)
    group, parts = {32: 4, 256: 1}.get(width, 2), (2 if width == 256 else 1)
    forward = [("tensor_core_forward", (tiles, "8bfloat16"), tile(4, patches, group), parts)]
    gradient_tile = tile(8 // gradient_patches, gradient_patches, 1)
    query = ("tensor_core_grad_query", (tiles, "8bfloat16"), gradient_tile, 1)
    both = ["Lb1ELb1E"] if width < 128 else ["Lb1ELb0E", "Lb0ELb1E"]
    keys = [("tensor_core_grad_key", (tiles, "8bfloat16", b), tile(8, 1, 1), 1) for b in both]
    return forward, [query, *keys] if width < 256 else []


def simt_tiles(case):
    width = next(w for w in (32, 64, 128, 256) if case.channels <= w)
    rows = 4 if case.kernel * width <= 13 * 64 else 8
    slices = 4 if width <= 64 else width // 16

    def tile(places, step):
        columns = 32 // slices * places
        return Tile(rows, columns, 1, columns, step, 1, step - 1, width, 4, strip=places)

    tiles = f"TilesILi{width}ELi{rows}E"
    return [("simt_forward", (tiles,), tile(4, 2), 1)], [
        ("simt_grad_query", (tiles,), tile(2, 2), 1),
        ("simt_grad_key", (tiles,), tile(2, 1), 1),
    ]


PRODUCTS = {"score": 0, "weigh": 1, "transposed": 2}


def product_tile(product):
    step = 2 if product == "score" else 1
    return Tile(8, 32, 1, 32, step, 1, step - 1, 64, 4, tensors=1, strip=4)


class Model:
    def __init__(self, library, tool):
        self.usage = machine.resources(machine.dump(tool, library, "-arch", "sm_90", "-res-usage"))
        self.code = machine.instructions(machine.dump(tool, library, "-arch", "sm_90", "-sass"))
        self.kernels = {}

    def kernel(self, name, parts, biased=False):
        key = name, parts, biased
        if key not in self.kernels:
            product = "HMMA" if name.startswith("tensor") else "FFMA"
            self.kernels[key] = Kernel(self.code, self.usage, (name, *parts), biased, product)
            if biased:  # whose loop may be listed in part: as often as its loads say
                loads = [k.count(*k.inner, "LDSM") or k.count(*k.inner, "LDS") for k in
                         (self.kernel(name, parts), self.kernels[key])]  # fmt: skip
                self.kernels[key].listed = loads[0] / loads[1]
        return self.kernels[key]

    def one_pass(self, case, forward, table, biased=False):
        """[(kernel's name, kernel, tile, seconds by resource)], floor and prediction; None if it is declined."""
        chosen = table(case)[0 if forward else 1]
        windows, tensor = case.windows(), case.elements() * (4 if table is simt_tiles else 2)
        if not chosen:
            return None
        kernels, predicted = [], (3 if forward else 7) * LAUNCH
        for name, substrings, tile, parts in chosen:
            kernel = self.kernel(name, substrings, biased)
            seen = transposed(windows) if name.endswith("key") else windows
            times = seconds(kernel.work(tile, seen, seen, case.batch * case.heads, parts), kernel.blocks)
            kernels.append((name, kernel, tile, times))
            predicted += max(*times.values(), (4 if forward else 6) * tensor / COPY) / EFFICIENCY
        if not forward:  # the queries' statistics
            predicted += 2 * tensor / COPY / EFFICIENCY
        return kernels, (4 if forward else 8) * tensor / COPY, predicted

    def product(self, case, product, element):
        """Of similarity and weighting: the same."""
        dtype = "EfE" if element == 4 else "8bfloat16"
        kernel, tile = self.kernel("simt_window_product", (f"Li64ELNS_7ProductE{PRODUCTS[product]}E", dtype)), None
        tile = product_tile(product)
        seen = transposed(case.windows()) if product == "transposed" else case.windows()
        need = kernel.work(tile, seen, seen, case.batch * case.heads)
        queries = case.batch * case.heads * case.side**2
        entries = queries * case.kernel**2
        need["issue"] += entries / 32 * 70  # about the length of the loop that moves them
        need["cache"] *= element / 4
        floor = (2 * case.elements() + entries) * element / COPY
        times = seconds(need, kernel.blocks)
        return kernel, tile, times, floor, max(*times.values(), floor) / EFFICIENCY + 2 * LAUNCH


def micro(time):
    return f"{1e6 * time:.{0 if time >= 9.5e-6 else 1}f}"


def row(*cells):
    print("|", " | ".join(str(cell) for cell in cells), "|")


def header(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def resources(times):
    return ", ".join(micro(times[name]) for name in ("mma", "issue", "shared", "cache"))


def print_kernels(model):
    header("kernel", "channels, k", "tile, warps", "registers", "shared memory", "warps a multiprocessor",
           "inner loop: instructions, products, loads")  # fmt: skip
    for biased in (False, True):
        for table, sizes in (
            (tensor_core_tiles, [(32, 13), (64, 7), (64, 13), (128, 13), (256, 13)]),
            (simt_tiles, [(32, 11), (64, 11), (128, 5), (256, 5)]),
        ):
            for channels, k in sizes:
                case = Case(4, 8, channels, 128, k)
                for forward in (True, False):
                    found = model.one_pass(case, forward, table, biased)
                    for name, kernel, tile, _ in found[0] if found else []:
                        product, load = ("HMMA", "LDSM") if "tensor" in name else ("FFMA", "LDS")
                        counts = [kernel.count(*kernel.inner, opcode) for opcode in ("", product, load)]
                        row(f"`{name}`" + (" with biases" if biased else ""), f"{channels}, {k}",
                            f"{tile.rows}x{tile.columns}, {tile.warps}", kernel.registers,
                            f"{kernel.shared_bytes / 1024:.0f} KiB", kernel.warps_resident(tile),
                            ", ".join(map(str, counts)))  # fmt: skip


def print_attention(model, table, cases, biased=False):
    header("batch x heads x channels, map, k", "useful GFLOP, forward", "floor, forward, backward, µs",
           "forward, µs: mma, issue, shared, L2", "predicted", "backward, each kernel, µs: mma, issue, shared, L2",
           "predicted", "TFLOP/s forward, backward")  # fmt: skip
    for case, what in cases:
        work = 4 * case.pairs() * case.channels
        passes = [model.one_pass(case, forward, table, biased) for forward in (True, False)]
        rates = [factor * work / found[2] / 1e12 for factor, found in zip((1, 2.5), passes) if found]
        row(f"{case.batch}x{case.heads}x{case.channels}, {case.side}x{case.side}, {case.kernel}{what}",
            f"{work / 1e9:.{2 if work < 1e10 else 0}f}", ", ".join(micro(found[1]) for found in passes if found),
            *(cell for found in passes for cell in (
                ["; ".join(resources(times) for *_, times in found[0]), f"**{micro(found[2])}**"] if found
                else ["`cuda_generic`", "not predicted"])),
            ", ".join(f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}" for rate in rates))  # fmt: skip


def print_products(model):
    header("product", "registers, warps a multiprocessor", "batch x heads x channels, map, k", "floor, µs",
           "issue, shared, L2, µs", "predicted", "TB/s, share of the copy")  # fmt: skip
    for element in (4, 2):
        for product in PRODUCTS:
            for case in [Case(4, 8, 64, 128, k) for k in (3, 7, 13)] + [Case(1, 1, 64, 128, 11)]:
                kernel, tile, times, floor, predicted = model.product(case, product, element)
                rate = floor * COPY / predicted
                row(f"{product}, {'float32' if element == 4 else 'bfloat16'}",
                    f"{kernel.registers}, {kernel.warps_resident(tile)}",
                    f"{case.batch}x{case.heads}x{case.channels}, {case.side}x{case.side}, {case.kernel}", micro(floor),
                    ", ".join(micro(times[name]) for name in ("issue", "shared", "cache")), f"**{micro(predicted)}**",
                    f"{rate / 1e12:.1f}, {100 * rate / COPY:.0f}%")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library")
    parser.add_argument("--cuobjdump")
    arguments = parser.parse_args()
    model = Model(arguments.library, machine.find_cuobjdump(arguments.cuobjdump))
    print_kernels(model)
    plain = [Case(4, 8, 64, 128, k) for k in (7, 13, 21)]
    widths = [Case(4, 8, d, 128, k) for d in (32, 128, 256) for k in (7, 13)]
    large = [Case(1, 8, 64, 512, k) for k in (7, 13, 21)] + [Case(1, 24, 128, 256, 80)]
    print_attention(model, tensor_core_tiles, [(case, "") for case in plain + widths + large])
    options = {
        "stride 2": {"stride": 2}, "stride 4": {"stride": 4}, "dilation 2": {"dilation": 2}, "causal": {"causal": True},
        "shift": {"border": "shift"}, "zero": {"border": "zero"},
    }  # fmt: skip
    print_attention(model, tensor_core_tiles, [
        (Case(4, 8, 64, 128, k, **settings), f", {name}") for k in (7, 13) for name, settings in options.items()
    ])  # fmt: skip
    print_attention(model, simt_tiles, [(Case(b, 1, 64, 128, k), "") for b in (1, 8) for k in (5, 11, 21)])
    print_attention(model, tensor_core_tiles, [(case, ", all biases") for case in plain], biased=True)
    print_attention(model, simt_tiles, [(Case(8, 1, 64, 128, k), ", all biases") for k in (5, 11, 21)], biased=True)
    print_products(model)


if __name__ == "__main__":
    main()
