"""What a reader can take from the website and how others come to it: files of data, notebooks, launch buttons, a card.

Where the site will stand is not known here. ``repository: url`` and ``html: baseurl`` in ``_config.yml`` say so; on
GitHub Actions they are known without. As long as they are not, nothing on the site depends on them.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat

from ..figures import card, typical
from ..runs import published_runs

__all__ = ["clean_downloads", "configure", "files_of_data", "stage_card"]

EXTRA = "_site"  # a folder of the staged book that Sphinx copies to the top of the site
LAUNCH = {
    "notebook_interface": "jupyterlab",
    "binderhub_url": "https://mybinder.org",
    "colab_url": "https://colab.research.google.com",
}
INLINE = 10_000  # characters of a data link that may stay in the page


def configure(config: dict[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The book's configuration with what follows from the addresses of repository and site."""
    config = {"repository": {}, **config}
    html, sphinx = dict(config["html"]), dict(config["sphinx"])
    owner, _, name = environ.get("GITHUB_REPOSITORY", "").partition("/")
    server = environ.get("GITHUB_SERVER_URL", "https://github.com")
    repository = config["repository"].get("url") or (f"{server}/{owner}/{name}" if name else "")
    site = html.get("baseurl") or (f"https://{owner}.github.io/{name}/" if name else "")
    html["baseurl"] = site
    if repository:
        config["repository"] = {**config["repository"], "url": repository}
        config["launch_buttons"] = {**LAUNCH, **config.get("launch_buttons", {})}
        html |= dict.fromkeys(("use_repository_button", "use_issues_button", "use_edit_page_button"), True)
    sphinx["extra_extensions"] = [*sphinx.get("extra_extensions", []), "sphinxext.opengraph"]
    about = {"ogp_site_url": site, "ogp_site_name": config["title"], "ogp_image": "card.png", "ogp_image_alt": _CARD}
    sphinx["config"] = {**sphinx["config"], **about, "html_extra_path": [EXTRA]}
    return {**config, "html": html, "sphinx": sphinx}


def clean_downloads(root: Path, site: Path, names: list[str]) -> None:
    """Let the site's download buttons give the notebooks as they are committed: the executed ones are its pages."""
    for name in names:
        shutil.copy(root / f"{name}.ipynb", site / "_sources" / f"{name}.ipynb")


def stage_card(stage: Path, title: str) -> None:
    """Put into a staged book the picture by which other sites announce a link to it."""
    (stage / EXTRA).mkdir(exist_ok=True)
    if runs := published_runs("mnist"):
        (stage / EXTRA / "card.png").write_bytes(card(typical(runs), title))


def files_of_data(stage: Path, name: str) -> None:
    """Turn the long data of an executed notebook into files, so that its page stays light: links to CSV, and the
    explorer's runs."""
    path = stage / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    folder = stage / EXTRA / "data"
    up = "../" * name.count("/")
    taken: dict[str, int] = {}

    def to_file(link: re.Match[str]) -> str:
        stem, content = link[1], link[2]
        if len(content) <= INLINE:
            return link[0]
        taken[stem] = taken.get(stem, 0) + 1
        file = f"{Path(name).name}-{stem}{f'-{taken[stem]}' if taken[stem] > 1 else ''}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(base64.b64decode(content))
        return f'<a download="{stem}.csv" href="{up}data/{file}"'

    def to_script(element: re.Match[str]) -> str:
        source, content = element[1], element[2]
        if len(content) <= INLINE:
            return element[0]
        folder.mkdir(parents=True, exist_ok=True)
        script = f"(window.samlibRuns ??= {{}})[{source!r}] = {content};\n"
        (folder / f"runs-{source}.js").write_text(script, encoding="utf-8")
        about = f'class="samlib-runs" data-source="{source}" data-src="{up}data/runs-{source}.js"'
        return f'<script type="application/json" {about}></script>'

    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if page := output.get("data", {}).get("text/html"):
                link = r'<a download="([^"]+)\.csv" href="data:text/csv;base64,([^"]*)"'
                text = re.sub(link, to_file, "".join(page))
                runs = r'<script type="application/json" class="samlib-runs" data-source="([^"]+)">(.*?)</script>'
                output["data"]["text/html"] = re.sub(runs, to_script, text, flags=re.DOTALL)
    nbformat.write(notebook, path)


_CARD = "Operator norm and SAM edge falling together during training, far below 2/η"
