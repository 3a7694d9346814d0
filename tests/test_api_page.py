"""The examples of docs/api.md run and print the output that the page shows."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A section has one example, which may be followed by its output.
EXAMPLE = re.compile(r"^## (.+?)\n.*?```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.S | re.M)


def test_examples_run_in_order(trained_run, tmp_path, monkeypatch):
    # As after training the quickstart.
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(trained_run)
    monkeypatch.chdir(tmp_path)

    names = {}
    page = (ROOT / "docs/api.md").read_text()
    examples = EXAMPLE.findall(page)
    assert len(examples) == page.count("```python")
    for title, code, output in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"example: {title}", "exec"), names)
        assert printed.getvalue() == output, title
        assert output or "assert" in code, title
