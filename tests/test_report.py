"""The report: what it shows, in which order, and that it stands alone; JSON, CSV and the console table."""

import base64
import csv
import json
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from rich.console import Console

from omniad_edge.errors import InputError
from omniad_edge.metrics import ProductMetrics
from omniad_edge.report import (
    Case,
    ProductScores,
    choose_cases,
    metrics_table,
    write_metrics_csv,
    write_metrics_json,
    write_report,
)

NAN = float("nan")
SCREW = ProductMetrics("screw", 20, 40, 0.9876, 0.95, 0.9, 0.97, 0.45, 0.5, 0.91)
TILE = ProductMetrics("tile <&>", 10, 5, 0.8, 0.7, 0.6, NAN, NAN, NAN, NAN)
VOID = {"meta", "br", "img", "rect", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order; collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def a_case(kind, score, threshold=0.5, product="screw", path="", size=(40, 60), label=""):
    image = np.full((*size, 3), (200, 100, 50), np.uint8)
    label = label or ("defective" if score > threshold else "good")
    overlay = image[..., ::-1].copy()
    return Case(image, overlay, product, kind, score, threshold, path or f"{kind}/{score}.png", label)


def scores_of(product, scores, labels, threshold):
    """All of them judged by the score."""
    return ProductScores(product, scores, labels, threshold, np.asarray(scores) > threshold)


def read(path):
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture
def scored(rng):
    labels = np.arange(60) >= 20
    return scores_of("screw", (rng.normal(0.45, 0.1, 60) + 0.1 * labels).astype(np.float32), labels, 0.5)


def test_report_stands_alone(tmp_path, scored):
    cases = [a_case("scratch", 0.4), a_case("good", 0.6)]
    write_report(
        *(tmp_path / "new" / "report.html", "Line 3", {"Weights": "resnet34"}),
        *([SCREW, TILE], [scored], cases),
        latency={"engine, p50 / p99": "6.1 / 7.0 ms"},
    )
    html, page = read(tmp_path / "new" / "report.html")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        assert tag != "img" or attributes["alt"]
    assert not re.search(r"https?:|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    for text in ("Line 3", "Weights resnet34", "engine, p50 / p99 6.1 / 7.0 ms", "98.8", "n/a", "mean"):
        assert text in page.text


def test_links_lead_to_their_product(tmp_path, scored):
    write_report(tmp_path / "r.html", "t", {}, [TILE, SCREW], [scored])
    _, page = read(tmp_path / "r.html")
    (link,) = (attributes["href"] for tag, attributes in page.tags if tag == "a")
    assert link == "#product-1"
    assert [a["id"] for _, a in page.tags if "id" in a] == ["product-0", "product-1"]


def test_verdicts_are_counted_as_they_were_given(tmp_path):
    scores, labels = np.array([0.1, 0.2, 0.1, 0.2, 0.9]), np.array([False, False, True, True, True])
    rejected = np.array([False, True, False, True, True])  # two of them not for their score
    product = ProductScores("screw", scores, labels, 0.3, rejected)
    write_report(tmp_path / "r.html", "t", {}, [SCREW], [product])
    assert "screw 0.3000 1 of 3 (33.3 %) 1 of 2 (50.0 %)" in read(tmp_path / "r.html")[1].text


def test_the_worst_come_first_and_are_marked(tmp_path):
    cases = [
        *(a_case("good", 0.7), a_case("scratch", 0.45), a_case("good", 0.2), a_case("dent", 0.9)),
        *(a_case("dent", 0.1), a_case("good", 0.8), a_case("warp", 0.6), a_case("crack", 0.5)),
    ]
    write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=cases)
    html, page = read(tmp_path / "r.html")
    paths = re.findall(r'class="path">([^<]*)', html)
    assert paths[:3] == [
        "dent/0.1.png",
        "scratch/0.45.png",
        "crack/0.5.png",
    ]  # equal to the threshold: missed
    assert paths[3:5] == ["good/0.8.png", "good/0.7.png"]
    assert paths[5:] == ["dent/0.9.png", "warp/0.6.png", "good/0.2.png"]
    order = [page.text.index(word) for word in ("Worst misses", "Highest false rejects", "Judged rightly")]
    assert order == sorted(order)
    shown = [tuple(a["class"].split()[1:]) for t, a in page.tags if t == "figure" and "case" in a["class"]]
    assert shown == [("miss",)] * 3 + [("false-reject",)] * 2 + [("correct",)] * 3
    assert "MISS dent, verdict good score 0.1000 = 0.20 × threshold 0.5000" in page.text
    assert "FALSE REJECT good, verdict defective score 0.8000 = 1.60 × threshold 0.5000" in page.text
    assert "correct good, verdict good" in page.text
    wrong = a_case("mixed up", 0.1, label="wrong product")
    write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[wrong])
    assert "correct mixed up, verdict wrong product score 0.1000" in read(tmp_path / "r.html")[1].text
    assert "white outline: mask" in page.text


def test_groups_say_how_many_there_are_in_all(tmp_path):
    scores = np.array([0.6, 0.7, 0.1, 0.2, 0.3, 0.9])
    product = scores_of("screw", scores, np.array([False, False, True, True, True, True]), 0.5)
    cases = [a_case("good", 0.7), a_case("dent", 0.1), a_case("dent", 0.2), a_case("dent", 0.9)]
    write_report(tmp_path / "r.html", "t", {}, [SCREW], [product], cases)
    text = read(tmp_path / "r.html")[1].text
    for heading in ("Worst misses (2 of 3)", "Highest false rejects (1 of 2)", "Judged rightly (1 of 1)"):
        assert heading in text


def test_pictures_are_inside_small_and_in_their_colours(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[a_case("good", 0.1, size=(500, 1000))])
    _, page = read(tmp_path / "r.html")
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [picture["alt"] for picture in pictures] == ["camera image", "anomaly heatmap"]
    for picture, colour in zip(pictures, ((200, 100, 50), (50, 100, 200)), strict=True):
        data = base64.b64decode(picture["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (160, 320, 3)
        assert (picture["width"], picture["height"]) == ("320", "160")
        assert np.abs(pixels.reshape(-1, 3).mean(axis=0) - colour).max() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1)])
def test_odd_pictures_do_not_stop_the_report(tmp_path, size):
    write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[a_case("good", 0.1, size=size)])
    assert "correct" in read(tmp_path / "r.html")[1].text


def test_every_text_is_escaped(tmp_path):
    bad = '<script>alert("x")</script>&\''
    product = ProductMetrics(bad, 1, 1, *[0.5] * 7)
    scores = scores_of(bad, np.array([0.1, 0.9]), np.array([False, True]), 0.5)
    case = a_case(bad, 0.4, product=bad, path=bad)
    write_report(tmp_path / "r.html", bad, {bad: bad}, [product, TILE], [scores], [case], {bad: bad})
    html, page = read(tmp_path / "r.html")
    assert "<script" not in html
    assert "tile <&>" in page.text
    assert page.text.count(bad) == 11  # title 2, facts 2, latency 2, metrics, verdicts, section, kind, path
    labels = [attributes["aria-label"] for _, attributes in page.tags if "aria-label" in attributes]
    assert all(bad in label for label in labels)
    assert len(labels) == 2


def test_a_path_that_is_not_utf8_is_shown(tmp_path):
    path = b"dent/\xff.png".decode("utf-8", "surrogateescape")
    write_report(tmp_path / "r.html", "Prüfung", {}, [SCREW], cases=[a_case("dent", 0.9, path=path)])
    text = read(tmp_path / "r.html")[1].text
    assert "dent/?.png" in text
    assert "Prüfung" in text


def test_cases_without_a_positive_threshold_have_no_ratio(tmp_path):
    write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[a_case("dent", 0.25, threshold=0.0)])
    assert "score 0.2500, threshold 0.000" in read(tmp_path / "r.html")[1].text


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.1, 0.2, 0.9], [False, False, True]),
        ([0.3, 0.3], [False, True]),  # all equal, and equal to the threshold
        ([0.7], [False]),
        ([0.7, 0.8], [True, True]),
        ([], []),
        ([1e-12, 1e6, 0.3], [False, True, True]),
    ],
)
def test_charts_of_odd_scores_stay_in_their_frame(tmp_path, scores, labels):
    product = scores_of("screw", np.array(scores), np.array(labels, bool), 0.3)
    write_report(tmp_path / "r.html", "t", {}, [SCREW], [product])
    html, page = read(tmp_path / "r.html")
    assert not re.search(r'="[^"]*(nan|inf)', html)
    for tag, at in page.tags:
        if tag == "rect":
            x, y, width, height = (float(at[name]) for name in ("x", "y", "width", "height"))
            assert 12 <= x < x + width <= 408
            assert 12 <= y < y + height <= 223
        if tag == "polyline":
            points = np.array([point.split(",") for point in at["points"].split()], float)
            assert (points.min(axis=0) >= (48, 12)).all()
            assert (points.max(axis=0) <= (258, 222)).all()
    assert ("ROC curve: n/a" in page.text) == (len(set(labels)) < 2)


def test_bars_left_of_the_threshold_are_the_accepted_images(tmp_path, scored):
    write_report(tmp_path / "r.html", "t", {}, [SCREW], [scored])
    html, page = read(tmp_path / "r.html")
    tags = page.tags
    (cut,) = (float(a["x1"]) for tag, a in tags if tag == "line" and a["class"] == "cut")
    bars = [a for tag, a in tags if tag == "rect" and a["class"] in ("good", "bad")]
    for name, scores in (("good", scored.good), ("bad", scored.defective)):
        heights = [(float(a["x"]) < cut - 0.1, float(a["height"])) for a in bars if a["class"] == name]
        accepted = sum(height for left, height in heights if left) / sum(height for _, height in heights)
        assert accepted == pytest.approx((scores <= 0.5).mean(), abs=0.005)
        assert 0 < accepted < 1
    ticks = [float(word) for word in re.findall(r'x="42" y="\d+" text-anchor="end">([\d.]+)<', html)]
    tallest = max(float(a["height"]) for a in bars)
    assert tallest == pytest.approx(98, abs=0.1)
    assert ticks[0] == ticks[2] > ticks[1] == 0
    defective = [float(a["height"]) for a in bars if a["class"] == "bad"]
    assert sum(defective) / tallest * ticks[0] == pytest.approx(100, abs=1)
    ((circle),) = (a for tag, a in tags if tag == "circle")
    assert float(circle["cx"]) == pytest.approx(48 + 210 * (scored.good > 0.5).mean(), abs=0.06)
    assert float(circle["cy"]) == pytest.approx(222 - 210 * (scored.defective > 0.5).mean(), abs=0.06)


def test_cases_and_scores_of_unknown_products_are_refused(tmp_path, scored):
    with pytest.raises(InputError, match=r"no metrics for \['nut'\].*\['screw'\]"):
        write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[a_case("good", 0.1, product="nut")])
    with pytest.raises(InputError, match=r"no metrics for \['screw'\]"):
        write_report(tmp_path / "r.html", "t", {}, [TILE], [scored])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_report(tmp_path, monkeypatch):
    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr(cv2, "imencode", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        write_report(tmp_path / "r.html", "t", {}, [SCREW], cases=[a_case("good", 0.1)])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.html", "old")]


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        None,
    ],
)
def test_pictures_of_another_kind_are_refused(picture):
    right = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=r"a\.png: image: expected uint8 \(H, W, 3\)"):
        Case(picture, right, "screw", "good", 0.1, 0.5, "a.png", "good")
    with pytest.raises(InputError, match=r"a\.png: overlay: expected uint8 \(H, W, 3\)"):
        Case(right, picture, "screw", "good", 0.1, 0.5, "a.png", "good")


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="finite"):
        a_case("good", NAN)
    with pytest.raises(InputError, match="finite"):
        a_case("good", 0.1, threshold=float("inf"))
    with pytest.raises(InputError, match="finite"):
        scores_of("screw", np.array([0.1, NAN]), np.array([False, True]), 0.5)
    with pytest.raises(InputError, match=r"screw: threshold.*finite"):
        scores_of("screw", np.array([0.1, 0.2]), np.array([False, True]), NAN)
    with pytest.raises(InputError, match="bool"):
        scores_of("screw", np.array([0.1, 0.2]), np.array([0, 1]), 0.5)
    with pytest.raises(InputError, match="one shape"):
        ProductScores("screw", np.array([0.1, 0.2]), np.array([False, True]), 0.5, np.array([True]))


def test_chosen_cases_are_the_mistakes_and_one_of_each_kind():
    kinds = ["good"] * 5 + ["dent"] * 5 + ["bent"]
    scores = [0.6, 0.1, 0.2, 0.3, 0.9, 0.5, 0.4, 0.7, 0.8, 0.9, 0.1]
    rejected = [score > 0.5 for score in scores]
    assert choose_cases(kinds, scores, rejected, per_group=2) == [10, 6, 4, 0, 8, 2]
    assert choose_cases(kinds, scores, rejected) == [10, 6, 5, 4, 0, 8, 2]
    assert choose_cases([], [], []) == []
    rejected[10], rejected[2] = True, True  # whatever the score
    assert choose_cases(kinds, scores, rejected) == [6, 5, 4, 0, 2, 10, 8, 3]
    with pytest.raises(InputError, match=r"one kind, score and verdict an image, got 11, 10 and 11"):
        choose_cases(kinds, scores[:-1], rejected)
    with pytest.raises(InputError, match="finite"):
        choose_cases(["good"], [NAN], [True])


def test_metrics_json_is_strict_and_complete(tmp_path):
    write_metrics_json(tmp_path / "m.json", [SCREW, TILE], {"weights": "resnet34"})
    document = json.loads((tmp_path / "m.json").read_text(), parse_constant=pytest.fail)
    assert document["facts"] == {"weights": "resnet34"}
    assert document["products"][0] == SCREW.to_dict()
    assert document["products"][1]["product"] == "tile <&>"
    assert document["products"][1]["aupro"] is document["products"][1]["mad"] is None
    assert document["mean"]["image_auroc"] == pytest.approx((0.9876 + 0.8) / 2)
    assert document["mean"]["aupro"] == 0.91


def test_metrics_csv_has_one_row_a_product(tmp_path):
    quoted = ProductMetrics('a, "b"\nc', 1, 2, *[0.25] * 7)
    write_metrics_csv(tmp_path / "m.csv", [SCREW, TILE, quoted])
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["product"] for row in rows] == ["screw", "tile <&>", 'a, "b"\nc']
    assert {key: float(value) for key, value in rows[0].items() if key != "product"} == {
        key: value for key, value in SCREW.to_dict().items() if key != "product"
    }
    assert rows[1]["pixel_auroc"] == rows[1]["mad"] == ""


def printed(table, width):
    console = Console(width=width, color_system=None, record=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_console_table_shows_percents_and_the_mean():
    lines = printed(metrics_table([SCREW, TILE]), 100).splitlines()
    rows = [line.split() for line in lines if re.search(r"\d\.\d", line)]
    assert " ".join(rows[0]) == "screw 20 40 98.8 95.0 90.0 97.0 45.0 50.0 91.0 81.0"
    assert rows[1][:7] == ["tile", "<&>", "10", "5", "80.0", "70.0", "60.0"]
    assert rows[1][7:] == ["n/a"] * 5
    assert rows[2][:4] == ["mean", "30", "45", "89.4"]
    assert "mean" not in printed(metrics_table([SCREW]), 100)


def test_console_table_fits_80_columns_and_takes_any_name():
    long = ProductMetrics("[red]a_product_with_a_long_name", 1234, 1234, *[1.0] * 7)
    text = printed(metrics_table([long, SCREW]), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert text.count("100.0") == 8
    assert "[red]" in text
