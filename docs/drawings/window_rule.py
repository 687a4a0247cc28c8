"""Draws docs/images/window-rule.svg: one query's window under each option, as localattn.reference computes it.

python docs/drawings/window_rule.py docs/images/window-rule.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from localattn.reference import axis_windows

KEYS, CELL, MARGIN = 9, 16, 34  # extent of the key map; pixels of a cell; around each map
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = KEYS * CELL + 2 * MARGIN, KEYS * CELL + 2 * MARGIN + 34, 4
WINDOW, ZERO, QUERY, GROUP, MAP, LINE = "#4c8dd6", "#dbe8f7", "#e8762d", "#f7c9a6", "#eeeeee", "#ffffff"


class Panel(NamedTuple):
    title: str
    caption: str
    query: tuple[int, int]
    kernel: int = 5
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    raster: bool = False
    border: str = "mask"
    queries: int = KEYS


PANELS = [
    Panel('border="mask"', "outside the map: left out", (1, 1)),
    Panel('border="zero"', "outside: score 0, value 0", (1, 1), border="zero"),
    Panel('border="shift"', "moved inside: always k keys", (1, 1), border="shift"),
    Panel("dilation=2", "every second key", (4, 4), dilation=2),
    Panel("is_causal=True", "on both axes", (5, 5), causal=True),
    Panel('is_causal="raster"', "up to the centre in raster order", (4, 4), raster=True),
    Panel("stride=3", "nine queries share a window", (4, 4), stride=3),
    Panel("finer queries, 18 x 18", "centred on the nearest key", (9, 6), queries=18),
]


def draw() -> str:
    rows = (len(PANELS) + COLUMNS - 1) // COLUMNS
    width, height = COLUMNS * PANEL_WIDTH, rows * PANEL_HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(PANELS):
        left, top = index % COLUMNS * PANEL_WIDTH, index // COLUMNS * PANEL_HEIGHT
        parts += [f'<g transform="translate({left + MARGIN} {top + MARGIN})">', *_panel(panel), "</g>"]
    legend = [
        ("the query", QUERY),
        ("keys of its window", WINDOW),
        ("zeros outside the map", ZERO),
        ("other keys", MAP),
    ]
    for index, (text, colour) in enumerate(legend):
        x, y = 60 + index * 200, height - 26
        parts.append(_rectangle(x, y, CELL, CELL, colour))
        parts.append(f'<text x="{x + CELL + 6}" y="{y + 12}" font-size="13" text-anchor="start">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    rows, columns = (
        axis_windows(panel.queries, KEYS, panel.kernel, panel.stride, panel.dilation, panel.causal, panel.border, "cpu")
        for _ in range(2)
    )
    y, x = panel.query
    parts = [_key(i, j, MAP) for i in range(KEYS) for j in range(KEYS)]
    remaining = panel.kernel**2 // 2 + 1 if panel.raster else panel.kernel**2
    for u in range(remaining):
        i, j = divmod(u, panel.kernel)
        there = [bool(axis.inside[at, entry] | axis.outside[at, entry]) for axis, at, entry in
                 ((rows, y, i), (columns, x, j))]  # fmt: skip
        on_map = bool(rows.inside[y, i]) and bool(columns.inside[x, j])
        if on_map or (panel.border == "zero" and all(there)):
            parts.append(_key(int(rows.position[y, i]), int(columns.position[x, j]), WINDOW if on_map else ZERO))
    size = CELL * KEYS / panel.queries
    if panel.stride > 1:  # the queries with this window, by the rule itself
        same = [at for at in range(panel.queries) if torch.equal(rows.position[at], rows.position[y])]
        parts += [_query(at, other, size, GROUP) for at in same for other in same]
    parts.append(_query(y, x, size, QUERY))
    middle, bottom = KEYS * CELL / 2, KEYS * CELL
    parts.append(f'<text x="{middle}" y="{bottom + 34}" font-size="14" font-weight="bold">{panel.title}</text>')
    parts.append(f'<text x="{middle}" y="{bottom + 51}" font-size="12" fill="#555555">{panel.caption}</text>')
    return parts


def _key(row: int, column: int, colour: str) -> str:
    return _rectangle(column * CELL, row * CELL, CELL, CELL, colour)


def _query(row: int, column: int, size: float, colour: str) -> str:
    inset = size / 5 if size == CELL else 0  # a full-sized query lies on its key
    return _rectangle(column * size + inset, row * size + inset, size - 2 * inset, size - 2 * inset, colour)


def _rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    edge = LINE if colour != ZERO else "#9dbfe6"
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}" stroke="{edge}"/>'


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw())
