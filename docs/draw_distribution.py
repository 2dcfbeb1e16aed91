"""Draw how a global batch is formed and reduced, as SVG: python docs/draw_distribution.py (or: make drawings).

The records are those that the order of the packaged sample's first two steps names; two workers of two replicas share a batch
of 4.
"""

from collections.abc import Iterator
from pathlib import Path

from trainer.data.order import epoch_order

IMAGES = Path(__file__).parent / "images"
RECORDS, BATCH, WORKERS, REPLICAS, STEPS = 40, 4, 2, 4, 2
COLOURS = ("#7fb3d5", "#82c29a", "#f0b27a", "#c39bd3")
CELL = 22


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def cell(x: float, y: float, words: str, fill: str, width: float = CELL) -> str:
    """A small box with a number in it."""
    box = f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{CELL}" rx="3" fill="{fill}" stroke="#444"/>'
    return box + text(x + width / 2, y + 15, words, 11, "middle")


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    return f'<path d="M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}" stroke="#888" fill="none" marker-end="url(#a)"/>'


def shards(owner: dict[int, int]) -> Iterator[str]:
    """Both shards as rows of records, coloured by the place of the batch that reads them in the first two steps."""
    yield text(16, 62, "two shards, 40 records: the manifest knows each record's byte offset", 13)
    for record in range(RECORDS):
        row, column = divmod(record, RECORDS // 2)
        colour = COLOURS[owner[record]] if record in owner else "#eceff1"
        yield cell(16 + column * (CELL + 3), 74 + row * (CELL + 8), str(record), colour)


def batches(order: list[list[int]]) -> Iterator[str]:
    """The global batches of two steps."""
    yield text(16, 168, "global batches: places 0 to 3, whatever the number of workers", 13)
    for step, numbers in enumerate(order):
        yield text(16, 196 + step * 32, f"step {step}")
        for place, number in enumerate(numbers):
            yield cell(70 + place * 130, 180 + step * 32, f"place {place}: record {number}", COLOURS[place], 108)


def replicas() -> Iterator[str]:
    """One box for each replica, grouped by worker, and the sums below."""
    for worker in range(WORKERS):
        x = 60 + worker * 260
        yield f'<rect x="{x}" y="266" width="252" height="112" rx="6" fill="none" stroke="#444" stroke-dasharray="5 3"/>'
        yield text(x + 8, 392 + 2, f"worker {worker} reads only its own places' records")
    for replica in range(REPLICAS):
        x = 70 + replica * 130
        yield arrow(x + 54, 238, x + 54, 274)
        look = f'rx="4" fill="{COLOURS[replica]}" fill-opacity="0.35" stroke="#444"'
        yield f'<rect x="{x}" y="276" width="108" height="92" {look}/>'
        lines = (f"replica {replica}", "forward, backward", "loss = sum of its", f"examples / {BATCH}")
        yield from (text(x + 54, 294 + 20 * number, line, 12, "middle") for number, line in enumerate(lines))
        yield arrow(x + 54, 398, x + 54, 420)


def reduction() -> Iterator[str]:
    """The sum and what comes after it."""
    yield '<rect x="60" y="422" width="512" height="30" rx="4" fill="#d5d8dc" stroke="#444"/>'
    yield text(316, 442, "all-reduce: the SUM of the gradients, the same on every replica", 13, "middle")
    yield arrow(316, 452, 316, 474)
    yield '<rect x="60" y="476" width="512" height="30" rx="4" fill="#d5d8dc" stroke="#444"/>'
    yield text(316, 496, "then: finite? clip; one Adam update, the same everywhere. First for D, then for G", 13, "middle")


def drawings() -> dict[str, str]:
    """File name and SVG text of the drawing."""
    order = epoch_order(RECORDS, 0, 0, BATCH)[:STEPS].tolist()
    owner = {number: place for numbers in order for place, number in enumerate(numbers)}
    head_of_arrow = '<path d="M0,0 L7,3 L0,6 z" fill="#888"/>'
    marker = f'<marker id="a" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">{head_of_arrow}</marker>'
    body = [*shards(owner), *batches(order), *replicas(), *reduction()]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="526" font-family="sans-serif">',
        f'<defs>{marker}</defs><rect width="100%" height="100%" fill="white"/>',
        text(16, 28, "A step on two workers of two replicas, batch size 4", 15),
        *body,
        "</svg>",
        "",
    ]
    return {"distribution.svg": "\n".join(lines)}


if __name__ == "__main__":
    for name, drawing in drawings().items():
        (IMAGES / name).write_text(drawing)
        print(f"wrote {IMAGES / name}")
