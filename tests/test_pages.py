"""The parts of a page: what they hold is escaped, in place, and readable without colour, script or network."""

import re
from html.parser import HTMLParser

import pytest

from diffdistill.pages.chart import Axis, Rule, Series, line_chart, number
from diffdistill.pages.document import Cell, document, facts, folded, paragraph, picture, section, table

NASTY = '<script>alert("1")</script> & \' more'


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    VOID = {"meta", "img", "circle", "rect", "path"}

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_whatever_is_written_is_text_and_every_tag_is_closed():
    chart = line_chart([Series(NASTY, [(0, 1), (1, 2)], 0)], title=NASTY, x_label=NASTY, y_label=NASTY)
    parts = [
        paragraph(NASTY, "lead"),
        table(NASTY, ["", NASTY, "b"], [(NASTY, [Cell(NASTY, NASTY), Cell("2", best=True)], "x")]),
        picture(b"png", alt=NASTY, caption=NASTY),
        folded(NASTY, NASTY),
        facts([(NASTY, NASTY)]),
        chart,
    ]
    page = document(NASTY, [section(NASTY, parts)])
    reader = Reader(page)
    assert reader.open == []
    assert "script" not in {tag for tag, _ in reader.tags}
    assert "".join(reader.text).count(NASTY) == 18  # title, heading, paragraph, 6 of the table, and so on


def test_a_table_names_its_rows_and_columns_and_scrolls_in_its_own_box():
    made = table(
        "A caption", ["", "a", "b"], [("one", [Cell("1", value="1.25"), Cell("2")], ""), ("two", [Cell("x")], "")]
    )
    tags = Reader(made).tags
    scopes = [attributes["scope"] for tag, attributes in tags if tag == "th"]
    assert scopes == ["col"] * 3 + ["row"] * 2
    assert [attributes.get("colspan") for tag, attributes in tags if tag == "td"] == [None, None, "2"]
    assert tags[0] == ("div", {"class": "scroll", "role": "region", "tabindex": "0", "aria-label": "A caption"})
    assert 'data-value="1.25"' in made


def test_a_page_is_for_small_screens_and_for_both_modes():
    page = document("A title", [])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert "prefers-color-scheme: dark" in page and '<html lang="en">' in page
    assert not re.search(r"url\(|@import|<link|<script|https?:", page)


def test_a_chart_places_its_points_and_says_itself_in_words():
    made = line_chart(
        [Series("a", [(0, 1.0), (10, 100.0)], 0, last=(20, 10.0)), Series("b", [(0, 50.0)], 1)],
        title="T",
        x_label="x",
        y_label="y",
        rules=[Rule("teacher", 2.0)],
        logarithmic=True,
    )
    circles = [attributes for tag, attributes in Reader(made).tags if tag == "circle"]
    x, y = ([float(circle[name]) for circle in circles[:3]] for name in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
    assert y[0] - y[2] == pytest.approx(y[2] - y[1], abs=0.11)  # 1, 10, 100 in equal steps on a logarithmic axis
    assert 'aria-label="T: y against x, a from 1 to 10; b from 50 to 50"' in made
    dashes = re.findall(r'class="curve" style="stroke:var\(--c(\d)\)" stroke-dasharray="([^"]*)"', made)
    assert len(set(dashes)) == 2  # a curve is told by its dash too, alike in chart and legend


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.001, 0.0011), (0.4, 15.0), (3.0, 3.0001), (1.0, 9e5), (7e-9, 3e-8)])
def test_ticks_are_few_and_within_the_axis(low, high, logarithmic):
    axis = Axis(low, high, 0, 100, logarithmic)
    assert 2 <= len(axis.ticks()) <= 9
    assert all(0 <= axis(value) <= 100 for value in axis.ticks())
    assert axis(low) == 0 and axis(high) == pytest.approx(100)


def test_a_chart_of_one_value_or_of_negative_ones_is_drawn_and_an_empty_one_refused():
    axes = {"title": "T", "x_label": "x", "y_label": "y"}
    for points in ([(0.0, 0.0)], [(0.0, 5.0)], [(0.0, -1.0), (1.0, 3.0)]):
        assert "NaN" not in line_chart([Series("a", points, 0)], **axes, logarithmic=True)
    with pytest.raises(ValueError, match="no point"):
        line_chart([Series("a", [], 0)], **axes)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1.23456, "1.23"), (123.456, "123"), (2e-5, "2.00e-05"), (0.5, "0.5")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text
