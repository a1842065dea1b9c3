"""Markdown as one HTML page that needs no other file: no scripts, no links to the outside."""

import base64
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from wavg_jax.reporting.canvas import DARK, LIGHT, WIDTH, Plot

_COLOURS = (
    f"--ink: {LIGHT.ink}; --paper: {LIGHT.paper}; --rule: #d5d5d5; --soft: #f4f4f2; --link: #0a5a9c; "
    "--shade: rgb(0 0 0 / 35%);"
)
_DARK_COLOURS = (
    f"--ink: {DARK.ink}; --paper: {DARK.paper}; --rule: {DARK.faint}; --soft: #222427; --link: #8cc4f0; "
    "--shade: rgb(255 255 255 / 45%);"
)
# Wide content has a shade at the edge where it continues: two covers scroll along and hide the shades at its ends.
STYLE = f"""
:root {{ color-scheme: light dark; {_COLOURS} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK_COLOURS} }} }}
body {{ color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }}
a {{ color: var(--link); }}
h1, h2, h3 {{ line-height: 1.25; }}
h2 {{ margin-top: 3rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); }}
h3 {{ margin-top: 2rem; }}
span.scroll {{ display: block; }}
.scroll {{ overflow-x: auto; width: fit-content; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 40px 100%,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 40px 100%,
  linear-gradient(to right, var(--shade), transparent) left / 16px 100%,
  linear-gradient(to left, var(--shade), transparent) right / 16px 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }}
.hint {{ display: none; margin: 0; font-size: 13px; }}
table {{ border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .5rem; border-bottom: 1px solid var(--rule); white-space: nowrap; font-size: 15px; }}
th {{ border-bottom-width: 2px; white-space: normal; vertical-align: bottom; }}
th:first-child, td:first-child {{ position: sticky; left: 0; background: var(--paper); }}
.prose td:last-child {{ white-space: normal; }}
img {{ max-width: 100%; height: auto; }}
pre {{ background: var(--soft); padding: .7rem 1rem; overflow-x: auto; font-size: 14px; }}
@media screen and (max-width: 700px) {{
  h1 {{ font-size: 1.5rem; }}
  .hint {{ display: block; }}
  .scroll img {{ max-width: none; width: 760px; }}
}}
"""
HINT = '<span class="hint">Scroll sideways \N{RIGHTWARDS ARROW}</span>'


def slug(heading: str, taken: Iterable[str] = ()) -> str:
    """The anchor of a heading, as GitHub makes it.

    >>> slug("To 95 % test accuracy"), slug("Cost", ["cost"])
    ('to-95--test-accuracy', 'cost-1')
    """
    base = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    number = sum(re.fullmatch(rf"{re.escape(base)}(-\d+)?", name) is not None for name in taken)
    return f"{base}-{number}" if number else base


def contents(parts: Sequence[str]) -> str:
    """Links to the headings among the parts of a Markdown text: one line for each of the second level."""
    taken: list[str] = []
    lines: list[str] = []
    for part in parts:
        found = re.fullmatch(r"(#{1,3}) (.*)", part)
        if not found:
            continue
        marks, title = found.groups()
        taken.append(slug(re.sub(r"\\(.)", r"\1", title), taken))
        link = f"[{title}](#{taken[-1]})"
        if marks == "##":
            lines.append(f"- {link}")
        elif marks == "###":
            lines[-1] += (":" if lines[-1].count("](#") == 1 else " \N{MIDDLE DOT}") + f" {link}"
    return "\n".join(lines)


def html_page(title: str, markdown: str, plots: Sequence[Plot]) -> str:
    """Markdown as one HTML page with its images embedded, light and dark.

    Args:
      title: of the page.
      markdown: text; `plots/NAME.png` names the plot NAME.
      plots: the images.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", _image)
    parser.add_render_rule("table_open", _table_open)
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    _anchor(tokens)
    body = parser.renderer.render(tokens, parser.options, {f"plots/{plot.name}.png": plot for plot in plots})
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def html_fragment(markdown: str) -> str:
    """Markdown without images as plain HTML, for a notebook's cell."""
    return str(MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown))


def _anchor(tokens: Sequence[Token]) -> None:
    taken: list[str] = []
    for token, inline in itertools.pairwise(tokens):
        if token.type == "heading_open":
            taken.append(slug("".join(child.content for child in inline.children or ()), taken))
            token.attrSet("id", taken[-1])


def _table_open(renderer: RendererHTML, tokens: Sequence[Token], place: int, *_: Any) -> str:
    end = next(i for i in range(place, len(tokens)) if tokens[i].type == "tr_close")
    columns = sum(token.type == "th_open" for token in tokens[place:end])
    if columns < 3:
        return '<div class="scroll prose" tabindex="0"><table>\n'
    return f'{HINT}<div class="scroll" tabindex="0"><table>\n'


def _image(renderer: RendererHTML, tokens: Sequence[Token], place: int, options: Any, plots: Mapping[str, Plot]) -> str:
    token = tokens[place]
    plot = plots[str(token.attrGet("src"))]
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (plot.png, plot.dark))
    image = (
        # Paper is white, whatever the screen.
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{html.escape(token.content)}" width="{100 * plot.width:.0f}" src="{light}"></picture>'
    )
    wide = plot.width > WIDTH
    return f'{HINT}<span class="scroll" tabindex="0">{image}</span>' if wide else image
