"""MkDocs hooks: adds the README, the notebooks and linked files to the site, and adapts links.

Pages keep the links that work in the repository.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
# Pages outside docs/ and their names in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {uri: path for path, uri in PAGES.items()}
PICTURE = re.compile(r"!\[[^]]*\]\((?P<file>[^)\s]+)\)")
SPACE_IN_CELL = re.compile(r"(?<=\d) (?=%)")
LINK = re.compile(r"(?<=\]\()[^)#\s]+")
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>.+?)\$", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds PAGES, the notebooks as pages, and all files that a page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        for uri, content in _notebook_files(ROOT / "docs" / notebook.src_uri):
            files.append(File.generated(config, uri, content=content))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = _repository_path(target, page.src_uri)
            if path and _site_uri(path) not in files:
                files.append(File.generated(config, _site_uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Links to the site's copies of repository files, and from each picture to its file.

    Where a table is narrow, its numbers keep their percent signs.
    """
    uri = page.file.src_uri

    def replace(link: re.Match) -> str:
        path = _repository_path(link[0], uri)
        return posixpath.relpath(_site_uri(path), posixpath.dirname(uri)) if path else link[0]

    markdown = PICTURE.sub(r"[\g<0>](\g<file>)", LINK.sub(replace, markdown))
    lines = markdown.split("\n")
    return "\n".join(
        SPACE_IN_CELL.sub("\N{NO-BREAK SPACE}", line) if line.startswith("|") else line
        for line in lines
    )


def _notebook_files(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yields (name in the site, content) of a notebook's page and pictures."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_to_mathml, cell.source)
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    yield f"{path.stem}.md", body
    yield from resources["outputs"].items()


def _to_mathml(formula: re.Match) -> str:
    """MathML needs no script in the browser."""
    if formula["block"]:
        return mathml(formula["block"], display="block")
    return f"<span>{mathml(formula['inline'])}</span>"


def _repository_path(target: str, uri: str) -> str | None:
    """Returns the repository path of a link on the page `uri`; None if it is not a file."""
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))
    path = posixpath.normpath(posixpath.join(folder, target))
    return path if (ROOT / path).is_file() else None


def _site_uri(path: str) -> str:
    """Returns the name in the site of a repository file."""
    return PAGES.get(path, path.removeprefix("docs/")).removesuffix(".ipynb") + (
        ".md" if path.endswith(".ipynb") else ""
    )
