"""Give the documentation site the repository's own pages, with the links between them intact.

Half of the pages lie outside ``docs/``: the README, the cluster's and the benchmarks' pages. Every
page keeps its path in the repository as its source path, so a relative link means the same on the
site as on disk; files that a page links to (configs, manifests) are published beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/peers/README.md",
    "cluster/README.md",
    "configs/README.md",
)
ROLE = re.compile(r":(?:class|func|meth):<code>~?(?:\w+\.)*(\w+)</code>")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the theme's files, the pages under their paths in the repository, and linked files."""
    pages = [*OUTSIDE, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    assets = (f"docs/{path}" for path in (*config.extra_css, *config.extra["polyfills"]))
    paths = [*pages, *_linked(pages), *(path for path in assets if (ROOT / path).is_file())]
    kept = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*kept, *(_file(path, config) for path in dict.fromkeys(paths))])


def on_page_content(html: str, **_: object) -> str:
    """Return the page with Sphinx roles of docstrings, such as ``:class:``, as plain code."""
    return ROLE.sub(r"<code>\1</code>", html)


def _linked(pages: list[str]) -> list[str]:
    """Return the files of the repository that the pages link to; folders are left out."""
    linked = []
    for page in pages:
        for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            target = (ROOT / page).parent.joinpath(link).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                linked.append(target.relative_to(ROOT).as_posix())
    return linked


def _file(path: str, config: MkDocsConfig) -> File:
    """Return a file whose address on the site has no ``docs/`` in it."""
    file = File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file
