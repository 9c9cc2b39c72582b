from urllib.parse import unquote

from matplotlib.figure import Figure

from wd_probe.report import page, values
from wd_probe.runs import style


def test_a_long_table_is_thinned_by_whole_steps():
    columns = {"step": [float(k // 3) for k in range(90_000)], "index": [0.0, 1.0, 2.0] * 30_000}
    url, every = values.csv_url(columns)
    rows = unquote(url).split(",", 1)[1].splitlines()
    assert every == 5
    link = page._templates.get_template("parts.html").module.download("long", columns)
    assert f'<a href="{url}" download="long.csv">long.csv (one in 5)</a>' in link
    assert rows[1:7] == ["0,0", "0,1", "0,2", "5,0", "5,1", "5,2"]


def test_a_long_line_is_embedded_as_a_picture():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([k % 7 for k in range(6_000)])
    axes.plot([1, 2])
    text = values.svg(figure, "long")
    assert text.count("<image") == 1
    assert len(text) < 100_000


def test_drawn_colours_are_the_pages():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], color=style.PALETTE["series-2"])
    axes.set_title("fill: #d1495b <&>")
    text = values.svg(figure, 'a "label" <b>')
    assert "stroke: var(--series-2)" in text
    assert "#000000" not in text
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in text
    assert "&lt;&amp;&gt;" in text


def test_what_stands_between_backticks_is_code_and_nothing_else_is():
    assert values.coded("a `--steps` <b> `x<y`") == (
        "a <code>--steps</code> &lt;b&gt; <code>x&lt;y</code>"
    )
    assert values.coded("one ` alone") == "one ` alone"
