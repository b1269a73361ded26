"""The report in a real browser: filters work, a phone's width is enough, nothing is requested or thrown."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from silkie.report import build_report
from silkie.report.schema import Answer, BenchmarkRow, Card, Curve, Report, System

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome on this machine")

# Runs in the report's own page and tells the page around it what it saw.
PROBE = """<script>
addEventListener("load", () => {
  const shown = () => document.querySelectorAll(".card:not([hidden])").length;
  const seen = {errors: window.probeErrors, width: document.documentElement.clientWidth, needs: document.documentElement.scrollWidth, first: shown(), more: document.querySelector(".more").textContent};
  document.querySelector(".more").click();
  seen.all = shown();
  seen.noMore = document.querySelector(".more").hidden;
  document.querySelector('button[data-flip="fixed"]').click();
  seen.fixed = shown();
  const category = document.querySelector("select[name=category]");
  category.value = "odd";
  category.dispatchEvent(new Event("input", {bubbles: true}));
  seen.fixedOdd = shown();
  seen.count = document.getElementById("count").textContent;
  document.querySelector('button[data-flip=""]').click();
  const text = document.querySelector("input[name=text]");
  text.value = "says UNICORN";
  text.dispatchEvent(new Event("input", {bubbles: true}));
  seen.searchOdd = shown();
  category.value = "";
  category.dispatchEvent(new Event("input", {bubbles: true}));
  seen.search = shown();
  text.value = "nowhere";
  text.dispatchEvent(new Event("input", {bubbles: true}));
  seen.emptyNote = !document.querySelector(".none").hidden;
  seen.images = [...document.images].every((image) => image.src.startsWith("data:") );
  const lines = (cell) => { const range = document.createRange(); range.selectNodeContents(cell); return range.getClientRects().length; };
  seen.brokenNumbers = [...document.querySelectorAll("td.n")].filter((cell) => lines(cell) > 1).map((cell) => cell.textContent);
  const svg = document.querySelector("svg.chart"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - box.width * 12 / 330, clientY: box.top + 20, bubbles: true}));
  seen.readout = document.querySelector("figure output").textContent;
  seen.hints = [...document.querySelectorAll(".hint")].map((hint) => !hint.hidden);
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name).filter((name) => !name.startsWith("data:"));
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>"""
FRAME = """<!doctype html><body style="margin:0"><iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="seen"></pre>
<script>addEventListener("message", (event) => {{ document.getElementById("seen").textContent = event.data; }});</script>"""


def page(folder) -> None:
    def card(i: int) -> Card:
        texts = ("A unicorn-free answer." if i else "A unicorn, says this answer.", "x" * 300 if i == 3 else "Short.")
        answers = [
            Answer(answer=text, correct=right, ratings={"Helpfulness": 4})
            for text, right in zip(texts, (i % 3 == 0, i % 2 == 0), strict=True)
        ]
        image = Image.new("RGB", (60, 40), ("red", "green")[i % 2])
        return Card(
            id=str(i),
            prompt="What is this?",
            base=answers[0],
            trained=answers[1],
            image=image,
            category=("even", "odd")[i % 2],
        )

    systems = tuple(
        System(name=n, value=v, low=v - 0.1, high=v + 0.1, difference=v - 0.3)
        for n, v in (("base", 0.3), ("a long name of a baseline", 0.5))
    )
    large = tuple(System(name=s.name, value=1000 + 500 * (s.value or 0), difference=-380.5) for s in systems)
    rows = [
        BenchmarkRow(name="A benchmark", metric=m, systems=s, headline=True)
        for m, s in (("accuracy", systems), ("score", large))
    ]
    curves = [Curve(title="Loss", series={"train": [(1, 0.7), (2, 0.25)]})]
    report = Report(
        title="T",
        configuration={"": {"a_very_long_option_name_without_any_break": "v" * 120}},
        gallery=[card(i) for i in range(40)],
        benchmarks=rows,
        curves=curves,
    )
    text = build_report(report, folder / "page.html").read_text()
    watch = "<script>window.probeErrors = []; addEventListener('error', (event) => window.probeErrors.push(event.message));</script>"
    (folder / "page.html").write_text(text.replace("<head>", "<head>" + watch).replace("</body>", PROBE + "</body>"))


@pytest.mark.parametrize("width", [390, 1280])
def test_filters_width_and_silence(tmp_path, width):
    page(tmp_path)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    options += [f"--window-size={max(width, 600)},1000", "--virtual-time-budget=5000", "--dump-dom"]
    result = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found and found.group(1), result.stderr[-2000:]
    seen = json.loads(found.group(1).replace("&amp;", "&"))
    assert seen["errors"] == [] and seen["requests"] == []
    assert seen["width"] == width and seen["needs"] <= width, "the page must not scroll sideways"
    assert (seen["first"], seen["more"], seen["all"], seen["noMore"]) == (24, "Show 16 more of 16", 40, True)
    # wrong before (i % 3 != 0) and right after (i even): 2, 4, 8, 10, ..., 38; none of them odd
    assert (seen["fixed"], seen["fixedOdd"], seen["count"]) == (13, 0, "0 of 40 fit")
    assert (seen["searchOdd"], seen["search"]) == (0, 1), "filters add up, and searching ignores case and order"
    assert seen["emptyNote"]
    assert seen["brokenNumbers"] == []
    assert seen["hints"] and set(seen["hints"]) == {width < 600}, "a table that is cut off says so, another does not"
    assert seen["images"] and seen["readout"] == "step 2: 0.25"
