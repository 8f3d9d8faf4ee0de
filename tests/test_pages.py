"""The parts of pages and tables that are shared: escaping, and the four layouts of a table."""

from __future__ import annotations

import csv
import io

import pytest
from markupsafe import Markup

from btrain.pages import tables
from btrain.pages.html import number, readable, render
from btrain.pages.tables import Cell


def test_a_title_is_text() -> None:
    page = render("btrain.pages", "page.html", title="</title><b>&'\"\x00\u202e")
    assert "<title>&lt;/title&gt;&lt;b&gt;&amp;&#39;&#34;\ufffd\ufffd</title>" in page


def test_only_strings_are_cut_and_cleaned() -> None:
    assert readable("x" * 1001) == "x" * 1000 + "…"
    assert readable("a\tb\nc\x1b[31m\ud800") == "a\tb\nc\ufffd[31m\ufffd"
    own = Markup("x" * 5000)
    assert readable(own) is own
    assert readable(5) == 5


def test_a_rounded_number_carries_all_its_digits() -> None:
    assert number(2 / 3, ".1f") == '<data value="0.6666666666666666">0.7</data>'


def test_numbers_stand_right_in_the_terminal() -> None:
    shown = tables.text(["name", "n"], [["a", "10"], ["a heading, wider than all"], ["long", "5"]])
    assert shown.splitlines() == ["name   n", "a     10", "a heading, wider than all", "long   5"]


def test_markdown_is_aligned_and_its_cells_are_text() -> None:
    shown = tables.markdown(["a", "b"], [["x|y", "<b>\n`c`"], ["1", "2"]])
    head, ruler, first, last = shown.splitlines()
    assert first == r"| x\|y | \<b\> \`c\` |"
    assert len({len(line) for line in (head, ruler, first, last)}) == 1


def test_a_table_for_a_file_is_not_padded_and_the_terminal_s_is() -> None:
    head, rows = ["", "b"], [["x|y\\", "1"], ["longer", ""]]
    table, padded = tables.compact(head, rows), tables.markdown(head, rows)
    assert table.splitlines() == ["|  | b |", "|---|---|", r"| x\|y\\ | 1 |", "| longer |  |"]
    assert tables.aligned(f"# |\n\n{table}\n\nend") == f"# |\n\n{padded}\n\nend"
    assert len({*map(len, padded.splitlines())}) == 1


def test_csv_keeps_texts_and_no_formula() -> None:
    cells = ['=cmd|"x"', "a, b", None, -1.5]
    (row,) = list(csv.reader(io.StringIO(tables.comma_separated(["a"] * 4, [cells]))))[1:]
    assert row == ['\'=cmd|"x"', "a, b", "", "-1.5"]


@pytest.mark.parametrize("named", [True, False])
def test_html_cells_are_escaped(named: bool) -> None:
    rows = [["<a>", Cell("1", small="<i>", style="color:red", title='"')], ["of all"]]
    shown = tables.html(["x", "<y>"], rows, "lines", named=named)
    assert '<th scope="col">&lt;y&gt;</th>' in shown
    assert ('<th scope="row">&lt;a&gt;</th>' if named else "<td>&lt;a&gt;</td>") in shown
    assert '<td style="color:red" title="&#34;">1<small>&lt;i&gt;</small></td>' in shown
    assert '<th colspan="2" scope="rowgroup">of all</th>' in shown
