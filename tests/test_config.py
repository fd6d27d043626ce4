"""The settings: each is read, checked, and shown without its secrets."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from outbox.config import BY_NAME, SETTINGS, Config, mask_url, masked, resolve, unknown_variables
from outbox.database import place
from outbox.errors import ConfigError

SECRET = "s3kret"

# A value that differs from the default, as its text and as what is in force.
OTHER: dict[str, tuple[str, object]] = {
    "database_url": ("postgresql://h/d", "postgresql://h/d"),
    "kafka_bootstrap_servers": ("k:1,k:2", "k:1,k:2"),
    "schema": ("events", "events"),
    "name": ("shop", "shop"),
    "shard": ("3", 3),
    "batch_rows": ("7", 7),
    "batch_bytes": ("1000", 1000),
    "poll_interval": ("0.5", 0.5),
    "busy_poll_interval": ("0.1", 0.1),
    "transaction_timeout": ("30", 30.0),
    "connect_timeout": ("3", 3),
    "statement_timeout": ("9", 9.0),
    "lock_timeout": ("0.2", 0.2),
    "lock_tries": ("2", 2),
    "on_lost_tail": ("stop", "stop"),
    "prune": ("on", True),
    "prune_interval": ("5", 5.0),
    "topic_check_interval": ("5", 5.0),
    "max_dead_letters": ("0", 0),
    "replication_factor": ("1", 1),
    "backoff_max": ("2", 2.0),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}


def test_the_table_and_the_value_name_the_same_settings() -> None:
    """One truth: a setting that is not in the table cannot be set, one that is not in the value turns nothing."""
    assert [s.name for s in SETTINGS] == [f.name for f in fields(Config)]


@pytest.mark.parametrize("name", [s.name for s in SETTINGS if s.name != "kafka"])
def test_each_setting_is_taken_from_its_variable(name: str) -> None:
    """And its source is remembered."""
    text, value = OTHER[name]
    resolved = resolve({}, {BY_NAME[name].variable: text}, None)
    assert getattr(resolved.config, name) == value
    assert getattr(Config(), name) != value
    assert BY_NAME[name].variable in resolved.sources[name]


def test_a_dotted_name_of_the_kafka_table_is_one_property(tmp_path: Path) -> None:
    """TOML reads security.protocol as a table in a table."""
    file = tmp_path / "outbox.toml"
    file.write_text('[kafka]\nsecurity.protocol = "SSL"\n"linger.ms" = 3\nssl.verify = true\n')
    assert resolve({}, {}, file).config.kafka == {"security.protocol": "SSL", "linger.ms": "3", "ssl.verify": "true"}


@pytest.mark.parametrize("name", [s.name for s in SETTINGS])
def test_a_value_of_the_wrong_kind_is_refused_with_what_is_allowed(name: str, tmp_path: Path) -> None:
    """`[]` fits no setting."""
    file = tmp_path / "outbox.toml"
    file.write_text(f"{name} = []\n")
    with pytest.raises(ConfigError, match=name) as caught:
        resolve({}, {}, file)
    assert str(file) in caught.value.message
    assert caught.value.cure.startswith("It must be ")


def test_an_unknown_name_in_the_file_names_the_one_that_was_meant(tmp_path: Path) -> None:
    """A mistyped setting would turn nothing, in silence."""
    file = tmp_path / "outbox.toml"
    file.write_text("batch_row = 3\n")
    with pytest.raises(ConfigError, match="batch_rows"):
        resolve({}, {}, file)


def test_an_unknown_variable_is_told_but_not_refused() -> None:
    """The service may have variables of its own with this prefix."""
    assert unknown_variables({"OUTBOX_BATCH_ROW": "3", "OUTBOX_SHARD": "1", "PATH": ""}) == {
        "OUTBOX_BATCH_ROW": "OUTBOX_BATCH_ROWS"
    }


def test_a_file_that_is_asked_for_and_missing_or_no_toml_is_refused(tmp_path: Path) -> None:
    """The one in the working directory may be missing."""
    with pytest.raises(ConfigError, match="not there"):
        resolve({}, {}, tmp_path / "none.toml", file_required=True)
    assert resolve({}, {}, tmp_path / "none.toml").config == Config()
    (tmp_path / "odd.toml").write_text("= 3")
    with pytest.raises(ConfigError, match="TOML"):
        resolve({}, {}, tmp_path / "odd.toml")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@host/db",
        f"postgresql+psycopg://user:{SECRET}@host/db",
        f"postgresql://user:a@{SECRET}@host/db",
        f"postgresql://user:a/{SECRET}@host/db",
        f"postgresql://host/db?user=u&password={SECRET}&sslmode=require",
        f"postgresql://host/db?sslpassword={SECRET}",
        f"host=h password={SECRET} dbname=d",
        f"host=h password = 'a {SECRET}' dbname=d",
        f"host=h password='it\\'s {SECRET}' dbname=d",
        f"postgresql://[host:{SECRET}@x",
    ],
)
def test_no_form_of_a_url_shows_its_password(url: str) -> None:
    """Neither where the settings are shown, nor where an error names the place."""
    assert SECRET not in str(masked("database_url", url))
    said = ""
    try:
        said = place(url)
    except ConfigError as error:
        said = str(error)
    assert said
    assert SECRET not in said


def test_what_is_no_secret_is_kept() -> None:
    """A masked URL still says where it points."""
    assert mask_url("postgresql://u:p@h:5/d?sslmode=require") == "postgresql://u:***@h:5/d?sslmode=require"
    assert mask_url("postgresql://u@h:5/d") == "postgresql://u@h:5/d"
    assert mask_url("host=h password='a b' dbname=d") == "host=h password=*** dbname=d"
