"""docs/ builds without a warning, and what its pages name is there: links, keys, files, sentences, shapes of data."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import omegaconf
import pytest

from mpo_megatron.config import Config, MpoConfig, check_keys
from mpo_megatron.data.partition import PARTITIONS
from mpo_megatron.data.schema import SHAPES, DataError, group_from_record
from mpo_megatron.errors import ConfigError
from mpo_megatron.objectives import get, names
from tests.helpers.pages import DOCS, ROOT, blocks, pages, rows
from tools.config_keys import SCHEMA, Key, sections

NOT_RUN = "Not run by a test"
# As an override or in backticks; code has methods of a model.
KEY = re.compile(r"\b(?:trainer|model)(?:\.[a-z_0-9]+)+(?=[=`])")
PATH = re.compile(r"\b(?:mpo_megatron|tools|examples|tests|conf|docs)/(?!\.work)[\w./-]*\w")
# Files of other projects that the pages cite.
OTHERS = {
    "docs/guides/dpo.md",
    "docs/performance-summary.md",
    "docs/preparation/prepare_data.rst",
    "examples/data_preprocess/full_hh_rlhf.py",
}
# Parts of a path that stand for others: conf/layout/PRESET/...
PLACEHOLDER = re.compile(r"/[A-Z_]+[/.]")
# Links in the source of a page; those that hooks make of tables have none.
EXTERNAL = re.compile(r"\bhttps?://[^\s)>\"'`]+")


def build(folder: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(folder / "mkdocs.yml"), "-d", str(site)],
        capture_output=True, text=True, timeout=120, cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    site = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT, site)
    assert done.returncode == 0, done.stderr
    return site, done.stderr


def test_the_pages_build_without_a_warning(built: tuple[Path, str]) -> None:
    site, output = built
    assert "Documentation built" in output
    assert not re.search("WARNING|ERROR", output), output
    for page in pages():
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        text = (site / name).read_text(encoding="utf-8")
        assert "<!-- made:" not in text
        assert "--8&lt;--" not in text
        # In the navigation of every page.
        home = (site / "index.html").read_text(encoding="utf-8")
        assert page.stem == "index" or f'href="{page.stem}/"' in home


def test_examples_are_shown_where_a_page_includes_them(built: tuple[Path, str]) -> None:
    """ruff formats Python in Markdown, and once made another thing of the line that includes a file."""
    site, _ = built
    page = html.unescape(
        re.sub("<[^>]+>", "", (site / "extending" / "index.html").read_text(encoding="utf-8"))
    )
    example = (ROOT / "examples" / "own_objective.py").read_text(encoding="utf-8")
    functions = re.findall(r"^def .*$", example, re.MULTILINE)
    assert functions
    assert all(line in page for line in functions)


def test_external_links_are_listed_and_not_fetched(built: tuple[Path, str]) -> None:
    _, output = built
    listed = set(re.findall(r"external link, not fetched: (\S+)", output))
    written = {
        link.rstrip(".,;:") for page in pages() for link in EXTERNAL.findall(page.read_text(encoding="utf-8"))
    }
    assert listed == written
    assert listed


@pytest.mark.parametrize(
    ("added", "told"),
    [
        ("[a](nowhere.md)", "nowhere.md"),
        ("[a](data.md#nowhere)", "nowhere"),
        ("[a](#nowhere)", "nowhere"),
        ("![a](nowhere.png)", "nowhere.png"),
    ],
)
def test_a_link_to_nothing_is_an_error(added: str, told: str, tmp_path: Path) -> None:
    for name in ("docs", "tools", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".work"))
    (tmp_path / "mpo_megatron").symlink_to(ROOT / "mpo_megatron")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "install.md").open("a") as page:
        page.write(f"\n{added}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    (warning,) = re.findall("WARNING .*", done.stderr)
    assert "install.md" in warning
    assert told in warning


def test_every_key_is_there_with_its_default(built: tuple[Path, str]) -> None:
    found = {
        key.path: key for section in sections(SCHEMA.read_text(encoding="utf-8")) for key in section.keys
    }
    assert {path: shown(key) for path, key in found.items()} == dict(defaults(Config, ""))
    assert [key.path for key in found.values() if not key.description] == []
    page = (built[0] / "configuration" / "index.html").read_text(encoding="utf-8")
    assert [path for path in found if f"<td><code>{path}</code></td>" not in page] == []
    assert [name for name in names() if f"<td><code>{name}</code></td>" not in page] == []
    assert all(re.search(rf"\b{name}\b", found["model.mpo.partition"].description) for name in PARTITIONS)


def shown(key: Key) -> Any:
    """The default as the YAML reader has it."""
    return omegaconf.OmegaConf.create(f"x: {key.default}").x if key.default else omegaconf.MISSING


def defaults(schema: type, path: str) -> Iterator[tuple[str, Any]]:
    """Every key of the schema and its default, from the classes themselves."""
    for field in fields(schema):
        key = f"{path}{field.name}"
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from defaults(field.type, f"{key}.")
        elif (schema, field.name) != (MpoConfig, "hyper_parameters"):
            value = field.default if field.default_factory is MISSING else field.default_factory()
            yield key, list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    hyper_parameters = {name for objective in names() for name in get(objective).hyper_parameters} | {"delta"}
    for name in sorted(set(KEY.findall(text))):
        if name.startswith("model.mpo.") and name.removeprefix("model.mpo.") in hyper_parameters:
            continue
        nested: Any = {}
        for part in reversed(name.split(".")):
            nested = {part: nested}
        try:
            check_keys(nested, Config, "")
            assert not name.startswith("model.mpo.") or name.split(".")[2] in {
                f.name for f in fields(MpoConfig)
            }
        except ConfigError as error:
            pytest.fail(f"{name}: {error}")
    for name in sorted(set(PATH.findall(text)) - OTHERS):
        if PLACEHOLDER.search(name):
            continue
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_blocks_are_run_or_say_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "console", "json", "python", ""), block
        if block.language == "console":
            assert NOT_RUN in block.before or NOT_RUN.lower() in block.before.lower(), block.text


def test_shapes_of_data_are_read_as_the_page_says() -> None:
    examples = [json.loads(block.text) for block in blocks(DOCS / "data.md", "json")]
    assert len(examples) == 6
    used = set()
    for example in examples:
        group = group_from_record(example, "page")
        assert [response.text for response in group.responses] == ["Red.", "Dog."]
        assert group.responses[0].score > group.responses[1].score
        assert group.messages[-1].content == "Name a colour."
        used.add(next(shape.keys for shape in SHAPES if set(shape.keys) <= set(example)))
    assert used == {shape.keys for shape in SHAPES}
    for unread in (
        {"context": [], "completions": [{"rank": 0, "completion": []}, {"rank": 1, "completion": []}]},
        {"data_source": "a", "prompt": [], "ability": "b", "reward_model": {}, "extra_info": {}},
        {"data_source": "a", "prompt": [], "reward_model": {}, "responses": ["Red.", "Dog."]},
        {"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"},
    ):
        with pytest.raises(DataError):
            group_from_record(unread, "page")


def test_sentences_are_those_of_the_program() -> None:
    quoted = [
        cell.strip("`")
        for cells in rows(DOCS / "troubleshooting.md")
        for cell in cells[:1]
        if cell.startswith("`") and "..." in cell
    ]
    assert len(quoted) >= 25
    said = [text for file in (ROOT / "mpo_megatron").rglob("*.py") for text in texts(file)]
    patterns = {sentence: ".*?".join(map(re.escape, sentence.split("..."))) for sentence in quoted}
    assert [s for s, pattern in patterns.items() if not any(re.search(pattern, text) for text in said)] == []


def texts(file: Path) -> Iterator[str]:
    """The string literals of a module; what is filled in stands as a dash, sums of strings are one."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield flat(node)


def flat(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(flat(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return flat(node.left) + flat(node.right)
    return "-"
