# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The page, the picture and the card of a report: what they say, and that a browser shows it."""

import io
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from nemo_ptq.errors import PtqError
from nemo_ptq.report.compose import with_quality
from nemo_ptq.report.page import grouped, headline, render_card, render_page, render_png
from nemo_ptq.report.records import ExpertTokens, Report, read_report, to_json
from nemo_ptq.report.write import FILES, write_report

from .examples import mixed, quality, report, unquantized

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REPORTS = {
    "measured": with_quality(report(), quality()),
    "failed": with_quality(report(), quality(0.8)),
    "unmeasured": report(),
    "unquantized": unquantized(),
    "experts": with_quality(report(experts=8), quality()),
    "mixed": with_quality(mixed(), quality()),
    "bare": replace(report(), layers=(), steps=(), findings=(), missing={}, command=None),
}


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text around them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.elements if name == tag]


@cache
def page_of(name: str) -> Elements:
    return Elements(render_page(REPORTS[name]))


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_self_contained_and_has_unique_ids(name: str) -> None:
    page = page_of(name)
    links = [
        value for _, attributes in page.elements for key, value in attributes.items() if key.endswith(("src", "href"))
    ]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not page.all("script")
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert [identifier for identifier, count in ids.items() if count > 1] == []
    used = [link[1:] for link in links if link.startswith("#")]
    assert set(used) <= ids.keys()


@pytest.mark.parametrize("name", REPORTS)
def test_every_chart_is_labelled(name: str) -> None:
    charts = page_of(name).all("svg")
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    expected = {"measured": 5, "failed": 5, "unmeasured": 4, "unquantized": 2, "experts": 6, "mixed": 6, "bare": 0}
    assert len(charts) == expected[name]


def test_page_says_what_matters() -> None:
    text = page_of("measured").text
    for words in (
        "Llama31Config8B in INT4 AWQ",
        "2.76 times smaller, with a perplexity 3.1 % higher",
        "pass",
        "/models/llama & co",
        "data/<texts>.jsonl",
        "MLP out (fc2), layer 2: weights at 9.5 dB",
        "quantization_config.awq_block_size",
        "nemo llm ptq",
        "0123456789abcdef",
        "1 min 15 s",
    ):
        assert words in text


def test_failure_and_missing_figures_are_said() -> None:
    assert "fail" in page_of("failed").text
    unmeasured = page_of("unmeasured").text
    assert "Not measured: turned off." in unmeasured
    assert "Errors of activations are missing: turned off." in unmeasured
    assert "Nothing is quantized" in page_of("unquantized").text
    assert "forward_loop" in page_of("bare").text


def test_colours_are_the_style_sheets() -> None:
    """A colour that is written into a chart would not change in the dark."""
    page = render_page(REPORTS["experts"])
    charts = page[page.index("<main") :]
    assert set(re.findall(r"#[0-9a-f]{6}\b", charts)) <= {"#ffffff"}


def test_the_same_report_gives_the_same_bytes() -> None:
    for example in (REPORTS["experts"], REPORTS["bare"]):
        assert render_page(example) == render_page(example)
        assert render_card(example) == render_card(example)
        assert render_png(example) == render_png(example)


@pytest.mark.parametrize("name", REPORTS)
def test_picture_has_its_size_and_something_on_it(name: str) -> None:
    with Image.open(io.BytesIO(render_png(REPORTS[name]))) as picture:
        assert picture.size == (1200, 630)
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


@pytest.mark.parametrize("name", REPORTS)
def test_card_has_metadata_and_figures(name: str) -> None:
    example = REPORTS[name]
    _, front, body = render_card(example).split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "llama & co"
    assert metadata["base_model_relation"] == "quantized"
    assert example.summary.algorithm in metadata["tags"]
    assert "torch 2.13.0" in body
    assert ("Not measured" in body) == (example.quality is None)
    if example.quality is not None:
        assert f"| perplexity | {example.quality.perplexity.value:.3f} |" in body
    # A table's rows stand together.
    assert not re.search(r"^\|.*\|\n\n\|", body, flags=re.MULTILINE)


def test_all_files_are_written_and_read_back(tmp_path: Path) -> None:
    example = REPORTS["experts"]
    write_report(tmp_path, example)
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == set(FILES)
    found = read_report(tmp_path / "ptq/report.json")
    assert to_json(found) == to_json(example)
    assert found.quality == example.quality
    assert found.summary == example.summary


def test_a_report_that_nothing_could_draw_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    content = json.loads(to_json(report()))
    file.write_text(json.dumps({**content, "layers": content["layers"][:1] * 20_001}))
    with pytest.raises(PtqError, match=r"report.json has a list of 20001 entries"):
        read_report(file)


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("rank0.safetensors", "tensorrt_llm"),
        ("model.safetensors", "vllm"),
        ("context/model.yaml", "nemo"),
        ("release/common.pt", "megatron-lm"),
    ],
)
def test_the_card_names_what_loads_the_directory(file: str, library: str) -> None:
    card = render_card(replace(report(), files={file: {"size": 1, "blake3": "0" * 64}}))
    assert f'\nlibrary_name: "{library}"\n' in card


def test_mixed_precision_is_said_by_layer() -> None:
    page, card = page_of("mixed"), render_card(REPORTS["mixed"])
    assert "attention in (qkv): 0 to 5; attention out (proj): 0 to 5" in page.text
    assert "| NVFP4 | MLP in (fc1): 0 to 5 |" in card
    assert "| unquantized | MLP out (fc2): 0 to 5 |" in card
    assert "5.98 bits per weight on average" in page.text and "5.98 bits of a weight on average" in card
    assert any(svg.get("aria-label") == "Predicted error over bits of a weight" for svg in page.all("svg"))
    assert "How each layer is quantized" not in page_of("measured").text
    assert "Which layer is quantized how" not in render_card(REPORTS["measured"])


def test_headline_tells_direction() -> None:
    def told(recovery: float) -> str:
        return headline(with_quality(report(), quality(recovery)).summary)

    assert told(0.98).endswith("a perplexity 2 % higher.")
    assert told(1.02).endswith("a perplexity 2 % lower.")
    assert told(1.0).endswith("the perplexity of the unquantized model.")


def test_findings_of_one_kind_are_one_paragraph() -> None:
    example = report(layers=8)
    findings = tuple(replace(example.findings[0], layer=layer) for layer in (5, 1, 2, 3))
    (group,) = grouped(findings)
    assert group.layers == "1 to 3, 5"
    assert group.worst.layer == 5


def browse(page: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    return subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions"),
            *("--disable-component-update", "--disable-background-networking", "--enable-logging=stderr"),
            *(f"--user-data-dir={page.parent / 'profile'}", "--window-size=1100,1600", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def large_report() -> Report:
    example = with_quality(report(layers=32, experts=8), quality())
    return replace(example, experts=tuple(ExpertTokens(layer, tuple(range(8))) for layer in range(32)))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_real_browser_opens_the_page(tmp_path: Path) -> None:
    write_report(tmp_path, large_report())
    page, picture = tmp_path / "ptq/report.html", tmp_path / "page.png"
    shown = browse(page, "--dump-dom")
    assert shown.returncode == 0
    assert "CONSOLE" not in shown.stderr
    assert len(Elements(shown.stdout).all("svg")) == 6
    browse(page, f"--screenshot={picture}")
    with Image.open(picture) as screenshot:
        colours = screenshot.convert("RGB").getcolors(1 << 24) or []
    # The accent of the charts as it is on a light page, and much that is not paper.
    assert (32, 99, 155) in {colour for _, colour in colours}
    assert max(count for count, _ in colours) < 0.97 * sum(count for count, _ in colours)


def test_choices_that_have_missed_the_recovery_are_listed(tmp_path: Path) -> None:
    found = mixed()
    assert found.mixed_precision is not None
    found = replace(found, mixed_precision=replace(found.mixed_precision, tried=((4.5, 0.9), (5.25, 0.95))))
    line = "scales counted. Fewer have recovered less: 0.9000 with 4.50, 0.9500 with 5.25.\n\n| scheme | layers |"
    assert line in render_card(found) and "scales counted.\n\n| scheme" in render_card(mixed())
    assert "Fewer have recovered less: 0.9000 with 4.50, 0.9500 with 5.25." in Elements(render_page(found)).text
    (tmp_path / "report.json").write_text(to_json(found))
    assert read_report(tmp_path / "report.json").mixed_precision == found.mixed_precision


@pytest.mark.parametrize(
    ("quality", "nearest", "note"),
    [
        ("max", range(6), "max; all layers rounded to nearest, which was better on held-out samples |"),
        ("max", (0, 1, 2, 5), "max; layers 0 to 2, 5 rounded to nearest, which was better on held-out samples |"),
        ("max", (), "max |"),
        ("balanced", (), "balanced |"),
        ("fast", range(6), "fast |"),
    ],
)
def test_the_card_says_what_max_has_rounded_to_nearest(quality: str, nearest: Sequence[int], note: str) -> None:
    found = report()
    layers = tuple(replace(its, rounding="nearest" if its.layer in nearest else "gptq") for its in found.layers)
    found = replace(found, summary=replace(found.summary, quality=quality), layers=layers)
    assert f"| quality | {note}" in render_card(found)
    assert f"quality {note.removesuffix(' |')}" in Elements(render_page(found)).text
