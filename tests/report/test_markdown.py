# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""Names from outside end neither a code span nor a table, and format nothing."""

from dataclasses import replace

import pytest

from nemo_ptq.report import markdown
from nemo_ptq.report.page import render_card
from tests.report.examples import report


@pytest.mark.parametrize(
    ("text", "span"),
    [("/a_b", "`/a_b`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("``a", "``` ``a ```"), ("a|b\nc", r"`a\|b\nc`")],
)
def test_a_code_span_holds_anything(text: str, span: str) -> None:
    assert markdown.code(text, in_table=True) == span


def test_plain_text_formats_nothing() -> None:
    assert markdown.plain("llama_2-7b.v1") == "llama_2-7b.v1"
    assert markdown.plain("_a_ **b** <i>[c](d)`|\n") == r"\_a\_ \*\*b\*\* \<i\>\[c\](d)\`\|\\n"


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert markdown.fence("a `b` ``") == "```"
    assert markdown.fence("a\n````\n") == "`````"


def test_a_card_of_a_checkpoint_with_a_hostile_name() -> None:
    name = "/models/a`<b>|c"
    plain = report()
    hostile = replace(plain, summary=replace(plain.summary, checkpoint=name), command=f"x '{name}```'")
    card = render_card(hostile)
    assert "\n# a\\`\\<b\\>\\|c, " in card
    assert "| base model | ``/models/a`<b>\\|c`` (" in card
    assert "\n````bash\n" in card
