"""The Python examples of docs/studies.md run and print the output that the page shows."""

import contextlib
import io
import re

import commands

PAGE = (commands.ROOT / "docs/studies.md").read_text()
EXAMPLE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)


def test_examples_print_what_the_page_shows():
    examples = EXAMPLE.findall(PAGE)
    assert len(examples) == PAGE.count("```python") > 0
    for code, output in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/studies.md", "exec"), {})
        assert printed.getvalue() == output
