"""Go's templates as scripts use them, and what is said of those that can't be read."""

from __future__ import annotations

import pytest

from wherry.cli.template import OpenMap, Template
from wherry.core.errors import InvalidArgument

VALUE = {
    "ID": "abc",
    "Names": ["a", "b"],
    "Labels": OpenMap({"x": "1", "y.z": "2"}),
    "Mounts": [{"Source": "/a"}, {"Source": "/b"}],
    "Empty": [],
    "Yes": True,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("{{.ID}} {{json .Names}}", 'abc ["a","b"]'),
        ("{{.ID | upper | lower}}", "abc"),
        ("{{range .Mounts}}{{.Source}},{{end}}", "/a,/b,"),
        ("{{range .Empty}}x{{else}}none{{end}}", "none"),
        ("{{range $k, $v := .Labels}}{{$k}}={{$v}};{{end}}", "x=1;y.z=2;"),
        ("{{range $i, $m := .Mounts}}{{$i}}{{end}}{{range $x := .Names}}{{$x}}{{end}}", "01ab"),
        ('{{index .Labels "y.z"}}-{{.Labels.nothere}}-{{(index .Mounts 1).Source}}', "2--/b"),
        ('{{if and .Yes (eq .ID "abc" "x")}}yes{{else}}no{{end}}', "yes"),
        ("{{if .Empty}}a{{else if not .Yes}}b{{else}}c{{end}}", "c"),
        ("a {{- .ID -}} b", "aabcb"),
        ('{{join .Names ", "}} {{len .Names}} {{.Yes}} {{.Names}}', "a, b 2 true [a b]"),
        ('{{$x := .ID}}{{printf "%s-%03d-%q" $x 7 .ID}}', 'abc-007-"abc"'),
        ("{{with .Mounts}}{{(index . 0).Source}} {{$.ID}}{{end}}{{/* nothing */}}", "/a abc"),
        ('{{range split "a b" " "}}<{{.}}>{{end}}{{title "x y"}}{{truncate .ID 2}}', "<a><b>X Yab"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert Template(template).render(VALUE) == text


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{.Nope}}", "no field .Nope; there are ID, Names"),
        ("{{nope .ID}}", "no function 'nope'; there are json"),
        ("{{.ID", "isn't closed"),
        ("{{end}}", "without a beginning"),
        ("{{if .ID}}x", "{{end}} is missing"),
        ("{{.ID | }}", "must follow '|'"),
        ("{{}}", "without anything"),
        ("{{.ID.Deeper}}", "can't look for .Deeper"),
        ("{{$x}}", "undefined variable $x"),
        ("{{index .Mounts 9}}", "index 9"),
        ("{{join}}", "wrong arguments"),
        ("{{.ID ?}}", "can't read"),
    ],
)
def test_mistakes_are_named(template: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint.replace("|", "[|]").replace("$", "[$]").replace("{", "[{]")):
        Template(template).render(VALUE)
