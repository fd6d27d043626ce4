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
