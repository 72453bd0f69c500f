"""Quality against cost: the rows that no other beats in both, and the table of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
COLUMNS = (
    ("evaluations", "evaluations", "{:g}"),
    ("FD", "frechet_distance", "{:.4g}"),
    ("extrapolated", "extrapolated_distance", "{:.4g}"),
    ("+-", "extrapolated_error", "{:.2g}"),
    ("KID", "kid", "{:.3g}"),
    ("precision", "precision", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("coverage", "coverage", "{:.3f}"),
    ("accuracy", "class_accuracy", "{:.3f}"),
    ("diversity", "diversity", "{:.3f}"),
    ("LPIPS", "lpips_diversity", "{:.3f}"),
    ("CLIP", "clip_score", "{:.2f}"),
    ("ms", "milliseconds", "{:.3g}"),
    ("images/s", "images_per_second", "{:.3g}"),
    ("parameters", "num_parameters", "{:,}"),
)


def on_front(rows: Sequence[Row]) -> list[bool]:
    """Whether each row is one that none beats: no other is as good and as cheap, and better or cheaper."""

    def beats(other: Row, row: Row) -> bool:
        theirs, ours = ((r["evaluations"], r["frechet_distance"]) for r in (other, row))
        return theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]

    return [not any(beats(other, row) for other in rows) for row in rows]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a star at those on the front; columns that no row has are left out."""
    used = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    lines = [["", *(title for title, _, _ in used)]]
    for row, best in zip(rows, on_front(rows), strict=True):
        cells = [text.format(row[key]) if key in row else "-" for _, key, text in used]
        lines.append([f"{'*' if best else ' '} {row['name']}", *cells])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
