"""Tables and sentences in a terminal of any width."""

import textwrap
from collections.abc import Iterator, Sequence

import rich.box
import rich.table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from wavg_jax.reporting.tables import TextTable


def terminal_block(heading: str, tables: Sequence[TextTable], lines: Sequence[str]) -> Group:
    """A heading, tables and sentences, for `rich.print`."""
    parts: list[RenderableType] = [Text(f"\n{heading}", style="bold")]
    for table in tables:
        parts += [Text(f"\n{table.title}\n", style="bold"), _Fitted(table), Text(table.note, style="dim")]
    bullets = rich.table.Table.grid(padding=(0, 1))
    for line in lines:
        bullets.add_row("-", Text(line))
    return Group(*parts, "", bullets)


class _Fitted:
    """A table that never folds a cell: it wraps its headings, drops spare columns, and continues below."""

    def __init__(self, table: TextTable):
        self._table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table, heads = self._table, self._table.columns
        rows = [row for section in table.sections for row in section]
        cells = [max([0, *(cell_len(row[i]) for row in rows)]) for i in range(len(heads))]
        widths = [max(cell, cell_len(head)) for cell, head in zip(cells, heads, strict=True)]
        every, room = list(range(len(heads))), options.max_width
        if _total(widths, every) > room:
            widths = [max(cell, *map(cell_len, head.split())) for cell, head in zip(cells, heads, strict=True)]
        if _total(widths, every) > room:
            every = [i for i in every if heads[i] not in table.spare]
        blocks = [[0]]
        for i in every[1:]:
            if len(blocks[-1]) > 1 and _total(widths, [*blocks[-1], i]) > room:
                blocks.append([0])
            blocks[-1].append(i)
        for number, block in enumerate(blocks):
            yield from [""] * (number > 0)
            yield _rich(table, block, widths)


def _total(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[i] for i in columns) + 2 * (len(columns) - 1)


def _rich(table: TextTable, columns: Sequence[int], widths: Sequence[int]) -> rich.table.Table:
    shown = rich.table.Table(box=rich.box.SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    for i in columns:
        head = "\n".join(textwrap.wrap(table.columns[i], widths[i], break_long_words=False))
        shown.add_column(Text(head), justify="right" if i else "left", no_wrap=True)
    for section in table.sections:
        for row in section:
            shown.add_row(*(Text(row[i]) for i in columns))
        shown.add_section()
    return shown
