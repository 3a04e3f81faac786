from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from PIL import Image

from cellseg.data.synthetic import generate
from cellseg.predict.page import histogram, write_page
from cellseg.predict.pictures import outlined

RUN: dict[str, Any] = {
    "command": "cellseg predict --data.predict_dir plate",
    "version": "1.2.3",
    "model": "nuclei-1",
    "model_sha256": "0123abcd" * 8,
    "settings": {"decode": {"threshold": 0.45, "marker": 0.55, "min_area": 12, "flips": True}},
    "seconds": 3723.4,
}
# What has a meaning in a URL, in HTML, or on some disks.
HOSTILE = """a b/#1?x=2&amp;%41+~é核"'`<b>&</script><img src=x onerror="window.hit=1">.png"""
NO_DIAMETERS = np.zeros(0, np.int64)


def thumbnail(number: int) -> tuple[Image.Image, str]:
    image, labels = generate(number, size=64)
    picture = Image.fromarray(outlined(image, labels))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return picture, base64.b64encode(file.getvalue()).decode()


def row(file: str = "a.png", nuclei: int = 5, **other: Any) -> dict[str, Any]:
    return {
        "file": file,
        "plane": "",
        "status": "ok",
        "height": 60,
        "width": 80,
        "nuclei": nuclei,
        "median_area_px": "300",
        "median_diameter_px": "19.54",
        "seconds": "0.250",
        "message": "",
        "overlay": f"{file}_overlay.png",
        "thumbnail": "",
        "unusual": "",
        **other,
    }


def failure(file: str, message: str) -> dict[str, Any]:
    return {"file": file, "plane": "", "status": "error", "message": message, "seconds": "0.1"}


class Page(HTMLParser):
    """What a page says and holds, as the standard library's parser sees it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []  # also where they end: "/td"
        self.rows: list[list[str]] = []  # the cells of the images' table
        self.code = {"script": "", "style": ""}
        self.text = ""
        self._in_table = False
        self.feed(path.read_text("utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._in_table |= tag == "tbody"
        if tag == "td":
            self.rows[-1].append("")
        elif tag == "tr" and self._in_table:
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", {}))
        self._in_table &= tag != "tbody"

    def handle_data(self, data: str) -> None:
        last = self.elements[-1][0] if self.elements else ""
        if last in self.code:
            self.code[last] += data
            return
        self.text += f"{data} "
        if data.strip() and self._in_table:
            self.rows[-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def links(self) -> list[str]:
        tables = ("summary.csv", "objects.csv", "run.json")
        return [a["href"] for a in self.attributes("a") if a["href"] not in tables]


def written(
    folder: Path,
    rows: list[dict[str, Any]],
    diameters: np.ndarray[Any, Any] = NO_DIAMETERS,
    run: dict[str, Any] = RUN,
    shown: int = 1000,
    tables: Sequence[str] = (),
) -> Page:
    write_page(folder / "report.html", run, rows, diameters, shown, tables)
    assert [path.name for path in folder.glob("*.html")] == ["report.html"]
    return Page(folder / "report.html")


def test_page_says_what_was_run_and_what_came_out(tmp_path: Path) -> None:
    diameters = np.bincount([17, 18, 18, 19, 40])
    page = written(tmp_path, [row("a.png", 1200), row("b.png", 34)], diameters)
    for part in (RUN["command"], "1.2.3", "nuclei-1", RUN["model_sha256"], "1:02:03", "px",
                 "threshold 0.45, marker 0.55, min_area 12, flips True"):  # fmt: skip
        assert part in page.text
    assert "images 2" in page.text
    assert "nuclei 1,234" in page.text
    assert "nuclei per image (median; 34 to 1,200) 617 " in page.text
    assert "diameter of a nucleus (median) 18 px" in page.text
    assert "failed" not in page.text.lower()


def test_page_links_to_the_tables_that_there_are(tmp_path: Path) -> None:
    page = written(tmp_path, [row("a.png", 3)], tables=["rle.csv", "summary.csv"])
    links = [a["href"] for a in page.attributes("a") if not a["href"].endswith(".png")]
    assert links == ["rle.csv", "summary.csv", "run.json"]


def test_table_has_the_numbers_of_each_image(tmp_path: Path) -> None:
    odd = row("b.png", 1034, median_diameter_px="", unusual="very dark", message="2 NaN values")
    page = written(tmp_path, [row("a.png", 7), odd])
    first, second = page.rows
    size = "80 \N{MULTIPLICATION SIGN} 60"
    assert first == ["Overlay", "a.png", "7", "19.5", size, "0.25", ""]
    assert second[:-1] == ["Overlay", "b.png", "1,034", "", size, "0.25"]
    assert second[-1] == "Unlike the training data: very dark2 NaN values"
    assert "image unlike the training data 1 " in page.text


def test_nuclei_of_a_stack_are_not_added_up(tmp_path: Path) -> None:
    planes = [row("z.tif", count, plane=k) for k, count in enumerate((1001, 1003, 1007))]
    page = written(tmp_path, [row("a.png", 1013), *planes, failure("y.png", "cut off")])
    assert "4,024" not in page.text and "4024" not in page.text
    assert "images 2 planes 4" in page.text
    assert "nuclei per plane (median; 1,001 to 1,013) 1,005 " in page.text
    assert [cells[2] for cells in page.rows] == ["", "0", "1", "2"]


def test_failures_come_first_with_their_message(tmp_path: Path) -> None:
    rows = [row("a.png"), failure("b.png", "b.png: the file is cut off"), row("c.png")]
    page = written(tmp_path, rows)
    assert "failed 1" in page.text
    assert page.text.index("b.png the file is cut off") < page.text.index("a.png")
    assert [cells[1] for cells in page.rows] == ["a.png", "c.png"]


def test_rows_beyond_the_first_are_counted_in_a_line(tmp_path: Path) -> None:
    rows = [row(f"{k:04}.png") for k in range(1500)]
    rows += [failure(f"x{k:04}.png", "empty") for k in range(1100)]
    page = written(tmp_path, rows)
    assert len(page.rows) == 1000
    assert (
        page.text.index("x0999.png") < page.text.index("and 100 more") < page.text.index(" 0000.")
    )
    assert "and 500 more, in summary.csv" in page.text
    assert "x1000.png" not in page.text and " 1000.png" not in page.text
    assert "images 1,500" in page.text
    assert "more, in" not in written(tmp_path, rows[:3], shown=3).text


def test_a_run_without_a_success_or_without_nuclei_has_a_page(tmp_path: Path) -> None:
    failed = written(tmp_path, [failure("a.png", "empty")])
    assert "images 0" in failed.text and not failed.attributes("table")
    bare = written(tmp_path, [row("a.png", 0, median_diameter_px="", median_area_px="")])
    assert "image 1 nuclei 0" in bare.text and not bare.attributes("svg")
    assert written(tmp_path, []).attributes("h1")


class TestInjection:
    def test_no_text_from_outside_adds_an_element_or_an_attribute(self, tmp_path: Path) -> None:
        def shape(text: str) -> list[tuple[str, list[str]]]:
            run = {**RUN, "command": text, "model": text, "settings": {"decode": {text: text}}}
            rows = [
                row(text, message=text, unusual=text, thumbnail="/9g="),
                failure(text, text),
            ]
            page = written(tmp_path, rows, np.ones(5, int), run)
            assert page.text.count(" ".join(text.split())) == 10
            assert page.attributes("img")[0]["alt"] == f"Overlay of {text}"
            return [(tag, list(attributes)) for tag, attributes in page.elements]

        plain = shape("plain")
        assert shape(HOSTILE) == plain
        assert shape("\"' onload=alert(1) x='") == plain
        assert shape("{{ 7 * 7 }}{% raw %}<!--") == plain

    @pytest.mark.parametrize(
        "overlay", [HOSTILE, "javascript:alert(1)", "a:b/c\\d.png", "100%25 #?.png", "дом/核.png"]
    )
    def test_links_are_relative_paths_to_the_overlay(self, tmp_path: Path, overlay: str) -> None:
        (link,) = written(tmp_path, [row(overlay=overlay)]).links
        parts = urlsplit(link)
        assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "")
        assert link.isascii() and unquote(parts.path) == overlay

    def test_names_that_are_not_unicode_are_linked_by_their_bytes(self, tmp_path: Path) -> None:
        page = written(tmp_path, [row("caf\udce9.png", overlay="caf\udce9.png")])
        assert unquote_to_bytes(page.links[0]) == b"caf\xe9.png"
        assert page.rows[0][1] == "caf?.png"

    def test_only_the_page_s_own_script_and_style_are_allowed(self, tmp_path: Path) -> None:
        page = written(tmp_path, [row(thumbnail="/9g=")], np.ones(5, int))
        (policy,) = (m["content"] for m in page.attributes("meta") if "http-equiv" in m)
        for kind, code in page.code.items():
            digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
            assert code and f"{kind}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none';") and "unsafe" not in policy
        sources = [a["src"] for _, a in page.elements if "src" in a]
        assert len(sources) == 1 and all(str(source).startswith("data:") for source in sources)
        assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}


@pytest.mark.parametrize("overlay", ["", "a_overlay.png"])
def test_thumbnails_are_in_the_page_as_they_are(overlay: str, tmp_path: Path) -> None:
    _, thumbnail_of_it = thumbnail(0)
    page = written(tmp_path, [row(thumbnail=thumbnail_of_it, overlay=overlay)])
    assert len(page.links) == bool(overlay)
    (picture,) = page.attributes("img")
    head, data = picture["src"].split(",")
    assert head == "data:image/jpeg;base64"
    assert data == thumbnail_of_it
    assert picture["loading"] == "lazy"


class TestHistogram:
    @pytest.mark.parametrize("scale", [1, 7, 60, 3000])
    def test_bars_hold_what_numpy_counts(self, scale: int) -> None:
        values = np.random.default_rng(scale).poisson(scale, 5000)
        chart = histogram(np.bincount(values), "", ("n", "times"))
        found = [re.findall(r"[\d,]+", bar.title) for bar in chart.bars]
        numbers = [[int(n.replace(",", "")) for n in row] for row in found]
        edges = [row[0] for row in numbers]
        edges.append(numbers[-1][-2] + 1)
        assert len(chart.bars) <= 40
        assert [row[-1] for row in numbers] == np.histogram(values, edges)[0].tolist()
        assert sum(row[-1] for row in numbers) == 5000 and not chart.note

    def test_heights_are_those_on_the_axis(self) -> None:
        chart = histogram(np.array([0, 3, 0, 12, 9]), "", ("n", "times"))
        (zero, _), *_, (top, highest) = chart.y_ticks
        per_count = (zero - top) / highest
        assert [bar.height / per_count for bar in chart.bars] == pytest.approx([0, 3, 0, 12, 9])
        assert all(bar.y + bar.height == pytest.approx(zero) for bar in chart.bars)
        ticks = {number: x for x, number in chart.x_ticks}
        assert ticks[3] == pytest.approx(chart.bars[3].x + chart.bars[3].width / 2)

    def test_few_giants_do_not_squeeze_the_rest(self) -> None:
        counts = np.bincount([20] * 1000 + [30] * 1000 + [900, 5000])
        chart = histogram(counts, "", ("n", "times"))
        assert len(chart.bars) == 31
        assert chart.note == "2 larger, up to 5,000, not drawn"

    def test_ten_million_nuclei_fit(self, tmp_path: Path) -> None:
        page = written(tmp_path, [row()], np.full(60, 10_000_000 // 60))
        assert len(page.attributes("rect")) == 30
        assert "400,000" in page.text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    flags = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"]
    flags += ["disable-background-networking", "disable-component-update"]
    with playwright.sync_playwright() as play:
        running = play.chromium.launch(
            executable_path=chromium, args=[f"--{flag}" for flag in flags]
        )
        yield running
        running.close()


@pytest.mark.slow
class TestInBrowser:
    @pytest.fixture
    def page(self, browser: Any) -> Iterator[Any]:
        """A page that must neither complain nor load anything but files."""
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        page = context.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        loaded: list[str] = []
        yield page
        assert not complaints
        assert all(url.startswith(("file:", "data:")) for url in loaded)
        context.close()

    def column(self, page: Any, number: int) -> list[str]:
        cells: list[str] = page.locator(f"tbody td:nth-child({number})").all_text_contents()
        return cells

    def test_a_header_sorts_both_ways_by_number_with_the_empty_last(
        self, page: Any, tmp_path: Path
    ) -> None:
        rows = [
            row("i10", 9, median_diameter_px="9.5"),
            row("i9", 100, median_diameter_px="100.25"),
        ]
        rows += [
            row("b", 0, median_diameter_px=""),
            row("a", 1000, median_diameter_px="10.1", unusual="dark"),
        ]
        written(tmp_path, rows)
        page.goto((tmp_path / "report.html").as_uri())
        for name, number, order in [
            ("Nuclei", 3, ["0", "9", "100", "1,000"]),
            ("Nuclei", 3, ["1,000", "100", "9", "0"]),
            ("Diameter, px", 4, ["9.5", "10.1", "100.2", ""]),
            ("Diameter, px", 4, ["100.2", "10.1", "9.5", ""]),
            ("File", 2, ["i10", "i9", "b", "a"]),  # as in the summary
            ("Remarks", 2, ["a", "i10", "i9", "b"]),
        ]:
            button = page.get_by_role("button", name=name)
            button.focus()
            page.keyboard.press("Enter")
            assert self.column(page, number) == order
            (state,) = page.locator("th[aria-sort]").all()
            assert state.text_content() == name
            falls = order[:2] in (["1,000", "100"], ["100.2", "10.1"])
            assert state.get_attribute("aria-sort") == ("descending" if falls else "ascending")

    @pytest.mark.parametrize("name", ["plain.png", HOSTILE, "100%25 #?.png"])
    def test_a_thumbnail_opens_its_overlay(self, page: Any, tmp_path: Path, name: str) -> None:
        picture, data = thumbnail(3)
        overlay = tmp_path / name
        overlay.parent.mkdir(parents=True, exist_ok=True)
        picture.save(overlay)
        written(tmp_path, [row(name, overlay=name, thumbnail=data, message=name)], np.ones(5, int))
        page.goto((tmp_path / "report.html").as_uri())
        link = page.locator("td a")
        assert link.locator("img").evaluate("image => image.decode().then(() => 1)")
        assert page.evaluate("window.hit") is None
        link.click()
        page.wait_for_url(re.compile(r"\.png$"))
        opened = Path(url2pathname(urlsplit(page.url).path))
        assert opened == overlay and opened.is_file()
        assert page.locator("img").evaluate("image => image.naturalWidth") == picture.width

    def test_a_thousand_images_load_and_sort_in_a_moment(self, page: Any, tmp_path: Path) -> None:
        _, data = thumbnail(0)
        rows = [row(f"{k:04}.png", k * 7919 % 1000, thumbnail=data) for k in range(1200)]
        written(tmp_path, rows)
        started = time.monotonic()
        page.goto((tmp_path / "report.html").as_uri())
        for large in (False, True):
            page.locator("#gallery").set_checked(large)
            for _ in range(2):
                page.get_by_role("button", name="Nuclei").click()
                page.evaluate("new Promise(requestAnimationFrame)")
            counts = [int(cell) for cell in self.column(page, 3)]
            assert len(counts) == 1000 and counts == sorted(counts, reverse=True)
        assert time.monotonic() - started < 20  # two seconds on an idle machine

    def test_a_phone_shows_it_without_scrolling_sideways(self, page: Any, tmp_path: Path) -> None:
        name = "folder/" + "a_very_long_name_without_any_break" * 4 + ".tif"
        written(tmp_path, [row(name, plane=0), row("b"), failure(name, name)], np.ones(50, int))
        page.set_viewport_size({"width": 360, "height": 700})
        page.goto((tmp_path / "report.html").as_uri())
        for large in (True, False):
            page.locator("#gallery").set_checked(large)
            assert page.evaluate("document.documentElement.scrollWidth") == 360
