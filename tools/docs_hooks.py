"""Hooks of MkDocs (mkdocs.yml): what in docs/ is made of the code, the order of its pages, and its external links.

A line `<!-- made: NAME -->` in a page stands for what `MADE[NAME]` returns.
"""

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.config_keys import SCHEMA, markdown, sections  # noqa: E402

# As they are read; pages that are not named here come after these.
ORDER = (
    "index", "install", "first-run", "presets", "configuration", "data", "rollouts", "rounds", "evaluation",
    "comparing", "layouts", "planner", "launch", "gpu", "checkpoints", "metrics", "profiling", "master-weights",
    "troubleshooting", "extending",
)  # fmt: skip
MARK = re.compile(r"^<!-- made: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\bhttps?://[^\s)>\"'`]+")

log = logging.getLogger("mkdocs.hooks.docs")
_links: set[str] = set()


def configuration_keys() -> str:
    return markdown(sections(SCHEMA.read_text(encoding="utf-8")))


def objectives() -> str:
    from tools.objectives import markdown as table

    return table()


MADE: dict[str, Callable[[], str]] = {"configuration-keys": configuration_keys, "objectives": objectives}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Every page of the folder is in the navigation, whoever adds it."""
    names = sorted(Path(file.src_uri).with_suffix("").as_posix() for file in files.documentation_pages())
    first = [name for name in ORDER if name in names]
    config.nav = [f"{name}.md" for name in [*first, *(name for name in names if name not in first)]]
    return files


def on_page_markdown(text: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its made parts in it. KeyError: a mark names none."""
    made = MARK.sub(lambda mark: MADE[mark[1]](), text)
    _links.update(link.rstrip(".,;:") for link in LINK.findall(made))
    return made


def on_post_build(*, config: MkDocsConfig) -> None:
    """External links are listed, and not fetched: a build needs no network."""
    for link in sorted(_links):
        log.info("external link, not fetched: %s", link)
