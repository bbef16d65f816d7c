# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
"""The text of the demo with a real model."""

from demo.smollm2 import passages


def test_passages_are_of_paragraphs_alone() -> None:
    book = "<h1>Title</h1><p>One <b>bold</b>\n word.</p><pre>$ ls</pre><div class='para'>{} <pre>$ cat</pre></div>"
    other = "<table><tr><td><p>cell</p></td></tr></table>" + "<p>short</p>"
    long = "x" * 1600
    assert list(passages([book.format(long), other])) == [f"One bold word.\n{long}"]
