"""The page of results in a real browser: it loads nothing, shows its images, fits a phone, and can be dark or light."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_bench_results import FOLDERS

from bench import report
from bench.verify_worker import finding

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=800,900", "--dump-dom")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")

# The page in a frame as wide as a phone: a window of its own can't be that narrow.
PHONE = 390
PROBE = """<!DOCTYPE html>
<iframe id="frame" width="{width}" height="800" srcdoc="{page}"></iframe>
<pre id="facts"></pre>
<script>
addEventListener("load", () => {{
  const frame = document.getElementById("frame"), page = frame.contentDocument;
  document.getElementById("facts").textContent = JSON.stringify({{
    images: [...page.images].map(image => image.naturalWidth),
    fetched: [window, frame.contentWindow].flatMap(each => each.performance.getEntriesByType("resource"))
      .map(entry => entry.name).filter(name => !name.startsWith("data:")),
    width: page.documentElement.scrollWidth,
    columns: [...page.querySelectorAll("tr")].map(row => row.cells.length),
    font: Math.min(...[...page.querySelectorAll("td, pre")].map(
      each => parseFloat(frame.contentWindow.getComputedStyle(each).fontSize))),
    text: frame.contentWindow.getComputedStyle(page.body).color,
    page: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
  }});
}});
</script>
"""


def in_browser(page: str, folder: Path, *options) -> dict:
    """What a browser finds in it."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=PHONE, page=html.escape(page)))
    command = [BROWSER, *OPTIONS, *options, f"--user-data-dir={folder / 'profile'}", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(re.search(r'<pre id="facts">(.+?)</pre>', done.stdout)[1]))


def brightness(color: str) -> int:
    return sum(map(int, re.findall(r"\d+", color)[:3]))


@pytest.fixture
def page(tmp_path):
    """Of a result with a long table."""
    rows = [
        finding(f"case {number}, with a name as long as they are", "cpu", "right") | {"ratios": {"loss": 0.5}}
        for number in range(30)
    ]
    result = report.begin("verify", "cpu") | {
        "method": "A <test>", "cases": rows, "fast": [], "planned": [], "tuned": {}, "host": [], "undone": ["a test"]
    }  # fmt: skip
    report.write(result, tmp_path)
    return (tmp_path / "report.html").read_text()


@needs_browser
def test_the_page_of_a_result(page, tmp_path):
    light, dark = in_browser(page, tmp_path), in_browser(page, tmp_path, "--force-dark-mode")
    for found in (light, dark):
        assert found["fetched"] == []
        assert len(found["images"]) == 1
        assert found["images"][0] > 0
        assert found["width"] <= PHONE
        assert found["columns"] == 31 * [6]
        assert found["font"] >= 11
    assert brightness(light["page"]) > 600 > 200 > brightness(light["text"])
    assert brightness(dark["page"]) < 200 < 600 < brightness(dark["text"])


@needs_browser
@pytest.mark.skipif(not FOLDERS, reason="a source distribution has no results")
def test_the_pages_of_the_committed_results(tmp_path):
    for folder in FOLDERS:
        found = in_browser((folder / "report.html").read_text(), tmp_path)
        assert found["fetched"] == []
        assert len(found["images"]) == len(report.results(folder))
        assert min(found["images"]) > 0
        assert found["width"] <= PHONE


def test_tables_become_tables_of_html():
    text = "A title & more\n" + report.table(["", "a", "b"], [["x < y", "1", "2.5"], ["z", "", "3"]]) + "\n\nThe end"
    found = report.as_html(text)
    assert found.startswith("<pre>A title &amp; more</pre>")
    assert found.endswith("<pre>The end</pre>")
    cells = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall("<tr>.*?</tr>", found)]
    assert cells == [["", "a", "b"], ["x &lt; y", "1", "2.5"], ["z", "", "3"]]


def test_the_page_is_whole_without_a_browser(page):
    assert "<details>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "A &lt;test&gt;" in page
