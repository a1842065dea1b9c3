"""The HTML page: nothing outside is needed, it can be read on a phone and at night, and links lead somewhere."""

import re
from pathlib import Path

import pytest
from reports import make_rows, make_run

from wavg_jax.reporting import Caller, canvas, write_report
from wavg_jax.reporting.page import html_page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report of two scenarios."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "DPI", 30)
        rows = [*make_rows(seeds=2), *make_run("plain", 0, ()), *make_run("weighted", 0, ())]
        write_report(folder, rows, caller=Caller(rebuild="build DIR"))
    return folder


def test_the_page_needs_no_other_file(written: Path) -> None:
    text = (written / "report.html").read_text()
    tags = re.findall(r"<(\w+)", text)
    assert (tags.count("img"), tags.count("picture"), tags.count("table")) == (13, 13, 10)
    assert not {"script", "link", "iframe"} & set(tags)
    addresses = re.findall(r"""(?:src|srcset|href)=["']?(.{26})""", text)
    assert {address for address in addresses if address[0] != "#"} == {"data:image/png;base64,iVBO"}
    assert "http" not in text
    assert "url(" not in text


def test_every_image_has_its_dark_one_and_print_stays_light(written: Path) -> None:
    text = (written / "report.html").read_text()
    sources = re.findall(r'<source media="([^"]*)" srcset="([^"]*)"><img [^>]* src="([^"]*)"></picture>', text)
    assert len(sources) == 13
    assert {media for media, *_ in sources} == {"screen and (prefers-color-scheme: dark)"}
    assert all(dark != light for _, dark, light in sources)
    assert "@media screen and (prefers-color-scheme: dark)" in text


def test_tables_and_wide_figures_scroll_with_a_hint_where_they_do_not_fit() -> None:
    table = "| a | b | c |\n|:--|--:|--:|\n| 1 | 2 | 3 |"
    setup = "| a | b |\n|:--|:--|\n| 1 | 2 |"
    plots = [canvas.Plot(name, "", "", b"x", b"y", width) for name, width in (("narrow", 5.0), ("wide", 9.0))]
    images = [f"![{plot.name}](plots/{plot.name}.png)" for plot in plots]
    text = html_page("title", "\n\n".join([table, setup, *images]), plots)
    hint = '<span class="hint">Scroll sideways \N{RIGHTWARDS ARROW}</span>'
    assert re.findall(rf'({hint})?<(\w+) class="scroll', text) == [(hint, "div"), ("", "div"), (hint, "span")]
    assert re.search(r"\.hint {[^}]*display: none", text)
    assert re.search(r"@media screen and \(max-width: 700px\) {[^@]*\.hint {[^}]*display: block", text)


def test_links_lead_to_the_sections(written: Path) -> None:
    text = (written / "report.html").read_text()
    anchors = re.findall(r'<h[23] id="([^"]*)"', text)
    assert len(anchors) == len(set(anchors))
    links = re.findall(r'href="#([^"]*)"', text)
    assert links == [anchor for anchor in anchors if anchor not in ("did-weighting-help", "contents")]
    assert {"to-82--test-accuracy", "to-82--test-accuracy-1", "setup", "setup-1", "build-it-again"} <= set(links)
    assert re.findall(r"\(#([^)]*)\)", (written / "report.md").read_text()) == links  # as GitHub makes them


def test_the_answer_comes_first_with_its_figure_then_contents_and_definitions(written: Path) -> None:
    text = (written / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads == [
        *("Did weighting help?", "Contents", "What is compared"),
        *("2 of 8 shards with random labels", "Clean shards", "Build it again"),
    ]
    answer = text.split("## Contents")[0]
    assert "plots/headline.png" in answer
    assert answer.count("\n- ") == 2
    for term in ("sequential", "sync", "plain", "weighted", "measured", "computed"):
        assert len(re.findall(rf"^- \*\*{term}\*\*: .*\.$", text, re.M)) == 1
