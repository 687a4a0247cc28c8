"""Draws docs/images/biases.svg: which number each of the three biases adds to each entry of one query's window, by the
index that localattn.reference computes.

python docs/drawings/biases.py docs/images/biases.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from localattn.reference import axis_windows

KEYS, KERNEL, QUERY = 6, 3, (0, 3)  # extent of the key map; kernel size; the query, at the map's upper edge
CELL, MARGIN, GAP = 34, 24, 40
SHADES = ["#dbe8f7", "#c3d9f1", "#a9c8ea", "#8eb6e2", "#72a3da"]
MAP, QUERY_LINE = "#eeeeee", "#e8762d"
SPAN = KEYS + 2  # the map, and one entry around it


def main(path: str) -> None:
    panels = [
        ('bias, border="zero"', "one for each window entry", "zero", lambda u, v, dy, dx: (u * KERNEL + v, u + v)),
        ('rel_pos_bias, border="shift"', "by key - centre", "shift", lambda u, v, dy, dx: (f"{dy},{dx}", dy)),
        ('axis_bias[0], border="zero"', "by the entry's row", "zero", lambda u, v, dy, dx: (u, u * 2)),
    ]
    side = SPAN * CELL
    width, height = len(panels) * (side + GAP) + GAP, side + 2 * MARGIN + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, panel in enumerate(panels):
        parts += draw(*panel, GAP + number * (side + GAP), MARGIN + 44)
    Path(path).write_text("\n".join([*parts, "</svg>"]) + "\n")


def draw(title: str, caption: str, border: str, number, left: int, top: int) -> list[str]:
    rows, columns = (axis_windows(KEYS, KEYS, KERNEL, 1, 1, False, border, torch.device("cpu")) for _ in range(2))
    y, x = QUERY

    def square(row: int, column: int, fill: str, text: object = "") -> list[str]:
        at = left + (column + 1) * CELL, top + (row + 1) * CELL
        box = f'<rect x="{at[0]}" y="{at[1]}" width="{CELL - 2}" height="{CELL - 2}" fill="{fill}"/>'
        label = f'<text x="{at[0] + CELL / 2 - 1}" y="{at[1] + CELL / 2 + 4}" font-size="12">{text}</text>'
        return [box, label] if text != "" else [box]

    middle = left + SPAN * CELL / 2
    parts = [
        f'<text x="{middle}" y="{top - 28}" font-size="15" font-weight="bold">{title}</text>',
        f'<text x="{middle}" y="{top - 10}" font-size="13" fill="#555555">{caption}</text>',
    ]
    for row in range(KEYS):
        for column in range(KEYS):
            parts += square(row, column, MAP)
    for u in range(KERNEL):
        for v in range(KERNEL):
            key = int(rows.position[y, u]), int(columns.position[x, v])
            offset = int(rows.offset[y, u]), int(columns.offset[x, v])
            text, shade = number(u, v, *offset)
            parts += square(*key, SHADES[int(shade) % len(SHADES)], text)
    at = left + (x + 1) * CELL - 1, top + (y + 1) * CELL - 1
    outline = f'width="{CELL}" height="{CELL}" fill="none" stroke="{QUERY_LINE}" stroke-width="3"'
    return [*parts, f'<rect x="{at[0]}" y="{at[1]}" {outline}/>']


if __name__ == "__main__":
    main(sys.argv[1])
