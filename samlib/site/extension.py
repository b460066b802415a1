"""A Sphinx extension: what the website needs beyond Jupyter Book.

The site asks nothing of any other host, so MathJax is copied into it: the one component in use and its fonts, from the
package ``sphinx-mathjax-offline`` (which as an extension would copy all of MathJax, 25 MB). When the pages are written,
they are searched for faults that Sphinx does not see. The site's own address gets a page that leads to the first one.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

from .typography import typeset

__all__ = ["faults", "setup"]

MATHJAX = ("tex-chtml.js", "output/chtml/fonts")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.config.mathjax_path = f"mathjax/{MATHJAX[0]}"
    app.connect("html-page-context", _mend, priority=1000)
    app.connect("build-finished", _lead_in, priority=100)  # before the table of contents writes a page of its own
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def faults(site: Path) -> list[str]:
    """What is wrong with the pages in a folder: one line per fault.

    A figure without alternative text; a link, picture or script inside of the site that leads nowhere. Sphinx checks
    the links and pictures of MyST; these may also come from raw HTML and from the outputs of notebooks.
    """
    pages = {path.resolve(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in _pages(site)}
    anchors = {
        path: {tag[key] for key in ("id", "name") for tag in page.select(f"[{key}]")} for path, page in pages.items()
    }
    found = []
    for path, page in pages.items():
        problems = [f"figure without alternative text: {tag.name} {tag.get('src', '')}" for tag in _silent(page)]
        for tag in page.select("[href], [src]"):
            link = str(tag.get("href") or tag.get("src") or "")
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists():
                problems.append(f"broken link: {link}")
            elif url.fragment and unquote(url.fragment) not in anchors.get(target, {unquote(url.fragment)}):
                problems.append(f"broken link: {link} (no such place on that page)")
        found += [f"{path.relative_to(site.resolve())}: {problem}" for problem in dict.fromkeys(problems)]
    return found


def _pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


def _silent(page: BeautifulSoup) -> list[Tag]:
    """Pictures that a reader who cannot see them would miss; ``aria-hidden`` says that one is decoration."""

    def name(picture: Tag) -> str:
        text = str(picture.get("alt") or picture.get("aria-label") or picture.get("aria-labelledby") or "")
        # Sphinx writes a picture's path where it has no text.
        return "" if Path(text).name == Path(str(picture.get("src", ""))).name else text

    pictures = page.select("img:not([aria-hidden=true]), svg:not([aria-hidden=true]):not(svg svg)")
    return [picture for picture in pictures if not name(picture)]


def _mend(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Before a page is written."""
    # Jupyter Book always adds Thebe, which would fetch code from elsewhere and sets its constants twice, an error.
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s} {getattr(s, 'attributes', '')}".lower()]
    # The items of a list of references have a role that ARIA has withdrawn, so screen readers find the list empty.
    context["body"] = typeset(context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"'))


def _lead_in(app: Any, error: Exception | None) -> None:
    """Write the page at the site's own address: it leads to the first page, and is announced elsewhere as that one is.

    An icon of its own, an empty one, or a browser asks the server for one at the usual place, where there is none.
    """
    if error or app.builder.name != "html":
        return
    first, folder = f"{app.config.master_doc}.html", Path(app.outdir)
    head = BeautifulSoup((folder / first).read_text(encoding="utf-8"), "html.parser").head
    assert head is not None
    about = "\n".join(map(str, head.select("title, meta[charset], meta[name=description], meta[property]")))
    (folder / "index.html").write_text(
        f"""<!DOCTYPE html>
<html lang="en">
<head>
{about}
<link rel="icon" href="data:,">
<meta http-equiv="refresh" content="0; url={first}">
</head>
<body><p><a href="{first}">To the first page</a></p></body>
</html>
""",
        encoding="utf-8",
    )


def _finish(app: Any, error: Exception | None) -> None:
    if error or app.builder.format != "html":
        return
    from sphinx.util import logging

    static = Path(app.outdir) / "_static"
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    assert spec is not None
    assert spec.origin is not None
    source, target = Path(spec.origin).parent / "static/mathjax", static / "mathjax"
    (target / MATHJAX[1]).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / MATHJAX[0], target / MATHJAX[0])
    shutil.copytree(source / MATHJAX[1], target / MATHJAX[1], dirs_exist_ok=True)
    for source_map in static.rglob("*.map"):
        source_map.unlink()  # of the theme's scripts, for its developers
    # 1.5 MB on every page, to draw a few icons that the theme's style sheet also has as a font.
    (static / "scripts" / "fontawesome.js").write_text(
        "// The icons come from the font in ../vendor/fontawesome.\n", encoding="utf-8"
    )
    if app.builder.name == "singlehtml":
        return  # one long page for printing, whose links `samlib.site.build.pdf` mends
    for fault in faults(Path(app.outdir)):
        logging.getLogger(__name__).warning(fault)
