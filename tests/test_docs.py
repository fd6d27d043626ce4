"""What the docs say twice is compared with the code."""

from __future__ import annotations

import re

import pytest

from render_docs import DOCS, PAGES, commands


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_what_the_code_says(page: str) -> None:
    """`python tests/render_docs.py` writes it anew."""
    assert (DOCS / page).read_text("utf-8") == PAGES[page]()


def test_every_command_has_a_help_and_an_example_of_itself() -> None:
    """A command is learnt from an example."""
    for name, command in commands():
        assert command.help, name
        assert (command.epilog or "").startswith("Example: "), name
        if name != "completion":
            assert f"outbox {name}" in (command.epilog or ""), name


def test_every_test_that_the_guarantees_name_exists() -> None:
    """A guarantee without its test is a promise."""
    tests = DOCS.parent / "tests"
    for row in re.findall(r"^\| .* \| (`test_.*) \|$", (DOCS / "guarantees.md").read_text("utf-8"), re.MULTILINE):
        files = re.findall(r"`(test_\w+\.py)`", row)
        assert files
        for name in files:
            assert (tests / name).is_file(), name
        for prefix in re.findall(r"`(test_\w+?)_?\.\.\.`", row):
            assert f"def {prefix}" in (tests / files[0]).read_text("utf-8"), prefix


def test_the_index_leads_to_every_page() -> None:
    """A page that nothing leads to is not read."""
    index = (DOCS / "index.md").read_text("utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_every_word_of_the_design_has_one_meaning_in_the_glossary() -> None:
    """Each once."""
    words = re.findall(r"^\| ([a-z ]+) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)[1:]
    assert len(words) == len(set(words))
    assert {"entity type", "key", "state", "tombstone", "entry", "outbox", "relay", "position", "epoch"} <= set(words)
    assert {"shard", "collapse", "cause", "read model"} <= set(words)


def test_the_files_that_pages_name_exist() -> None:
    """Modules and tests that the prose names in backticks."""
    root = DOCS.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    for page in pages:
        for path in re.findall(r"`((?:outbox|tests|cli|migrations|examples|docs)/[\w./-]+)`", page.read_text("utf-8")):
            if "NNN" not in path:
                assert (root / path).exists(), f"{page.name} names {path}"
