"""What the site shows besides docs/*.md: the repository's own pages, the tutorial, linked files.

All pages keep the links that they have in the repository; here they are made to lead to where the
site has the same file. MkDocs calls the two functions whose names begin with `on_`.
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
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCES = {uri: path for path, uri in PAGES.items()}
LINK = re.compile(r"(?<=\]\()[^)#\s]+")
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>.+?)\$", re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of PAGES, those of the notebooks, and the files that any page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        for uri, content in _of_notebook(ROOT / "docs" / notebook.src_uri):
            files.append(File.generated(config, uri, content=content))
    for page in list(files.documentation_pages()):
        for path in _linked(page.content_string, page.src_uri):
            if _uri(path) not in files:
                files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_) -> str:
    """Makes links to files of the repository lead to them in the site."""
    uri = page.file.src_uri

    def here(link: re.Match) -> str:
        path = _path(link[0], uri)
        return posixpath.relpath(_uri(path), posixpath.dirname(uri)) if path else link[0]

    return LINK.sub(here, markdown)


def _of_notebook(path: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yields a page and its pictures, by their places in the site."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = FORMULA.sub(_in_mathml, cell.source)
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    )
    yield f"{path.stem}.md", body
    yield from resources["outputs"].items()


def _in_mathml(formula: re.Match) -> str:
    if formula["block"]:
        return mathml(formula["block"], display="block")
    return f"<span>{mathml(formula['inline'])}</span>"


def _linked(markdown: str, uri: str) -> Iterator[str]:
    return filter(None, (_path(target, uri) for target in LINK.findall(markdown)))


def _path(target: str, uri: str) -> str | None:
    """Returns where in the repository the target of a page's link lies, None if it is no file."""
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))
    path = posixpath.normpath(posixpath.join(folder, target))
    return path if (ROOT / path).is_file() else None


def _uri(path: str) -> str:
    """Returns where in the site a file of the repository is."""
    inside = PAGES.get(path, path.removeprefix("docs/"))
    return re.sub(r"\.ipynb$", ".md", inside)
