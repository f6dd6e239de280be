"""MkDocs: pages that lie outside of docs/, and links to them.

Pages are written for readers of the repository, with links relative to the file. A link to a file outside of docs/ leads to a page of the site
here: Markdown and pictures keep their path, any other text file becomes a page that shows it. Reference pages are made from the code.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!\\)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")
PICTURES = {".png", ".svg", ".jpg"}
PAGES = {".md", ".ipynb"}
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".nf": "groovy", ".groovy": "groovy", ".yaml": "yaml"}
TABLE = re.compile(
    r"<!-- table: ([\w./]+)(?:#([\w ]+))? -->"
)  # the page links to the file, for readers of the repository
ROLE = re.compile(r":(?:class|func|meth|mod|data):(?=<code>)")  # what numpydoc links, MkDocs does not


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add everything that the pages link to, from page to page, and the reference."""
    known = {f"docs/{file.src_uri}" for file in files}
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting += ["CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "training/README.md"]
    waiting += ["examples/region.ipynb", "examples/cohort.ipynb"]
    while waiting:
        path = waiting.pop()
        if path not in known:
            known.add(path)
            files.append(_file(path, config))
        if Path(path).suffix in PAGES:
            waiting += [target for target in _targets(path) if target not in known]
    files.append(File.generated(config, "commands.md", content=_commands()))
    files.append(File.generated(config, "python.md", content=_python()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links of a page lead to the site's pages."""
    markdown = TABLE.sub(lambda match: _table(match[1], match[2]), markdown)
    here = _repository_path(page.file.src_uri)
    if here is None:
        return markdown

    def lead(match: re.Match[str]) -> str:
        target = _resolve(here, match[1])
        if target is None:
            return match[0]
        relative = posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".")
        return f"]({relative}{match[2]})"

    return LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the roles of reStructuredText."""
    return ROLE.sub("", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the theme's dialog for screen readers."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def _targets(path: str) -> Iterator[str]:
    for match in LINK.finditer(_markdown(path)):
        target = _resolve(path, match[1])
        if target is not None:
            yield target


def _resolve(page: str, link: str) -> str | None:
    """Path in the repository of a link on a page; ``None`` for an address or something that is not there."""
    if ":" in link or link.startswith("/"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    if target == "README.md":  # the site's first page
        return "docs/index.md"
    return target if (ROOT / target).is_file() else None


def _site_path(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if Path(path).suffix in PAGES:
        return str(Path(path).with_suffix(".md"))
    if Path(path).suffix in PICTURES:
        return path
    return f"source/{path.replace('/.', '/').lstrip('.')}.md"  # MkDocs leaves out what begins with a dot


def _repository_path(uri: str) -> str | None:
    """The file in the repository that a page of the site is; ``None`` for one that shows or is made from code."""
    if uri.startswith("source/") or uri in {"commands.md", "python.md"}:
        return None
    if (ROOT / "docs" / uri).is_file():
        return f"docs/{uri}"
    notebook = str(Path(uri).with_suffix(".ipynb"))
    return notebook if (ROOT / notebook).is_file() else uri


def _file(path: str, config: MkDocsConfig) -> File:
    if Path(path).suffix in PICTURES:
        return File.generated(config, _site_path(path), content=(ROOT / path).read_bytes())
    text = _markdown(path)
    if Path(path).suffix not in PAGES:
        text = f"# `{path}`\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"
    return File.generated(config, _site_path(path), content=text)


def _markdown(path: str) -> str:
    """The text of a file; of a notebook its texts, code, and what the code printed and drew."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output.get("data", {}):
                picture = "".join(output["data"]["image/png"].split())
                parts.append(f"![{cell['metadata']['alt']}](data:image/png;base64,{picture})")
    return "\n\n".join(parts) + "\n"


def _table(path: str, title: str | None) -> str:
    """The first table of a file of results, or of its section ``title``."""
    text = (ROOT / path).read_text(encoding="utf-8")
    section = text.split(f"## {title}\n", 1)[1] if title else text
    found = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)
    if found is None:
        raise ValueError(f"{path}: no table in it")
    return found[0]


def _commands() -> str:
    """A page of what every command says with `--help`."""
    import click

    from wsiseg.cli import main

    def sections(command: click.Command, parent: click.Context | None, name: str) -> Iterator[str]:
        with click.Context(command, info_name=name, parent=parent, max_content_width=80, terminal_width=80) as context:
            yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
            if isinstance(command, click.Group):
                for inner in command.list_commands(context):
                    yield from sections(command.get_command(context, inner), context, inner)

    return "\n".join(["# Commands\n", "What each command says with `--help`.\n", *sections(main, None, "wsiseg")])


def _python() -> str:
    """A page of all public names, in the order of their lesson."""
    import wsiseg

    first = ["segment_slide", "segment_image", "Run", "read_run", "read_cells", "TypedCells", "Seeds", "read_seeds"]
    names = [*first, *sorted(set(wsiseg.__all__) - set(first) - {"__version__"})]
    entries = [f"::: {getattr(wsiseg, name).__module__}.{name}\n" for name in names]
    return "\n".join(
        [
            "# Python\n",
            "Every name is one of `wsiseg` itself: `wsiseg.segment_slide`. [Use](library.md) has the lesson.\n",
            *entries,
        ]
    )
