"""What the README says is what happens."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from consume import live
from devstack.kafka import Kafka

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")

pytestmark = [pytest.mark.postgres, pytest.mark.kafka, pytest.mark.acceptance]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_five_minute_integration_works_as_it_is_printed(database_url: str, kafka: Kafka, tmp_path: Path) -> None:
    """A newcomer pastes the block into a shell, in the example's folder."""
    shop = tmp_path / "shop"
    shutil.copytree(ROOT / "examples" / "shop", shop)
    (script,) = [block for block in blocks("sh") if "outbox revision" in block]
    env = {key: value for key, value in os.environ.items() if not key.startswith("OUTBOX_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OUTBOX_DATABASE_URL": database_url,
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=shop, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    customers = live(kafka, "shop.customer").json
    assert customers == {
        "1": {"id": 1, "name": "Ada", "city": "Turin"},
        "2": {"id": 2, "name": "Emmy", "city": "Erlangen"},
    }
    assert live(kafka, "shop.price").json == {"tea": {"article": "tea", "cents": 420}}
    # The other half, beside it.
    window = ROOT / "examples" / "shop_window" / "copies.py"
    copied = subprocess.run(
        [sys.executable, str(window)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert copied.returncode == 0, copied.stderr
    assert dict(line.split(" ", 1) for line in copied.stdout.splitlines()) == {
        key: str(state) for key, state in customers.items()
    }
    # Status, the last command, shows that nothing waits.
    assert re.search(r"^customer +0 +shop.customer +0 ", done.stdout, flags=re.MULTILINE), done.stdout


def test_the_python_that_the_readme_shows_is_the_examples() -> None:
    """A snippet that drifts from the file that is run would be worse than none."""
    files = ("shop/models.py", "shop/service.py", "shop_window/copies.py")
    sources = "".join((ROOT / "examples" / file).read_text() for file in files)
    shown = blocks("python")
    assert shown
    for block in shown:
        for line in block.splitlines():
            assert line in sources, line


def test_the_make_targets_that_the_readme_names_exist() -> None:
    """`make test` runs this one; `make demo` is run by tests/test_demo.py."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_link_of_the_readme_and_the_docs_resolves() -> None:
    """Within the repository."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
