"""One table for the terminal, for Markdown and for HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table


@dataclass
class Grid:
    """A table of text.

    Attributes:
        title: what is in it.
        columns: headings; one that begins with "<" is aligned to the left, the others to the right.
        rows: as many cells as there are columns.
        caption: how to read it.
        strong: numbers of the rows that stand out: ours.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    caption: str = ""
    strong: set[int] = field(default_factory=set)

    def add(self, cells: Iterable[str], strong: bool = False) -> None:
        """One more row. ValueError where it does not fit."""
        row = list(cells)
        if len(row) != len(self.columns):
            raise ValueError(f"{self.title}: a row has {len(self.columns)} cells; got {row}")
        if strong:
            self.strong.add(len(self.rows))
        self.rows.append(row)

    def _headings(self) -> list[tuple[str, bool]]:
        return [(heading.removeprefix("<"), heading.startswith("<")) for heading in self.columns]

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(
            title=escape(self.title),
            caption=escape(self.caption),
            title_justify="left",
            caption_justify="left",
        )
        for heading, left in self._headings():
            table.add_column(escape(heading), justify="left" if left else "right", overflow="fold")
        for number, row in enumerate(self.rows):
            table.add_row(*map(escape, row), style="bold" if number in self.strong else None)
        return table

    def markdown(self) -> str:
        """A pipe table between its title and its caption."""
        lines = [f"**{_piped(self.title)}**", ""]
        lines.append(_line(heading for heading, _ in self._headings()))
        lines.append(
            "|" + "|".join("---" if left else "---:" for _, left in self._headings()) + "|"
        )
        lines += [_line(row) for row in self.rows]
        if self.caption:
            lines += ["", self.caption]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A table inside a box of its own that scrolls sideways where the window is narrow."""
        sides = [' class="left"' if left else "" for _, left in self._headings()]
        head = "".join(
            f'<th scope="col"{side}>{html.escape(heading)}</th>'
            for (heading, _), side in zip(self._headings(), sides, strict=True)
        )
        body = []
        for number, row in enumerate(self.rows):
            cells = "".join(
                f"<td{side}>{html.escape(cell)}</td>" for cell, side in zip(row, sides, strict=True)
            )
            mark = ' class="ours"' if number in self.strong else ""
            body.append(f"<tr{mark}>{cells}</tr>")
        note = f'<p class="note">{html.escape(self.caption)}</p>' if self.caption else ""
        title = html.escape(self.title)
        return (
            f"<h3>{title}</h3>\n"
            f'<div class="box" tabindex="0" role="region" aria-label="{html.escape(self.title)}">'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n"
            + "\n".join(body)
            + f"\n</tbody></table></div>\n{note}\n"
        )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(map(_piped, cells)) + " |"


def _piped(cell: str) -> str:
    """Text in a cell of Markdown."""
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
