"""What the reports share: how their Markdown is put together, and how they become files."""

import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from wavg_jax.reporting.canvas import Plot
from wavg_jax.reporting.page import contents, html_page
from wavg_jax.reporting.tables import escape
from wavg_jax.reporting.wording import setting_value
from wavg_jax.storage.rows import write_atomically
from wavg_jax.storage.schema import Row


class Caller(NamedTuple):
    """What the rows do not say, and the program that recorded them does.

    Attributes:
      meanings: what an arm is, by name; by default it is described by its run row.
      prefix: written before the name of a setting, such as the dashes of a flag.
      rebuild: the command that builds the report again; "" leaves its section out.
    """

    meanings: Mapping[str, str] = types.MappingProxyType({})
    prefix: str = ""
    rebuild: str = ""

    def setting(self, name: str, *values: Any) -> str:
        """A setting in one line, with all its values."""
        return f"{self.prefix}{name}=" + " | ".join(map(setting_value, values))

    def settings(self, settings: Mapping[str, Any]) -> str:
        """Settings as a block of code, without those that are None."""
        return code_block(*(self.setting(name, value) for name, value in settings.items() if value is not None))


def code_block(*lines: str) -> str:
    """Lines as they stand."""
    return "\n".join(["```", *lines, "```"])


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def image_link(plot: Plot) -> str:
    """A figure in Markdown."""
    return f"![{escape(plot.title)}](plots/{plot.name}.png)"


def dated(headers: Sequence[Row]) -> str:
    """When the runs were made, as far as the rows say."""
    days = sorted({str(header["started"])[:10] for header in headers if header.get("started")})
    if not days:
        return "The rows do not say when the runs were made."
    span = f"on {days[0]}" if len(days) == 1 else f"from {days[0]} to {days[-1]}"
    rest = "" if all(header.get("started") for header in headers) else "; some rows do not say when"
    return f"The runs were started {span} (UTC){rest}."


def assemble(head: Sequence[str], parts: Sequence[str], caller: Caller) -> str:
    """The text of a report: its head, its contents, its parts, and how to build it again."""
    if caller.rebuild:
        intro = "From the recorded rows alone, where each DIR holds a `rows.jsonl`:"
        parts = [*parts, "## Build it again", intro, code_block(caller.rebuild)]
    return "\n\n".join([*head, "## Contents", contents(parts), *parts]) + "\n"


def write_files(folder: str | pathlib.Path, title: str, markdown: str, plots: Sequence[Plot]) -> list[pathlib.Path]:
    """Writes a report as Markdown and as a page, with its plots, each file whole or not at all; returns the files.

    Raises:
      WorkdirError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    files = {folder / "plots" / f"{plot.name}.png": plot.png for plot in plots}
    files[folder / "report.md"] = markdown.encode()
    files[folder / "report.html"] = html_page(title, markdown, plots).encode()
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)
