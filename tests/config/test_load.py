"""Settings: the file, the variables on top, and everything that is refused with file, line, key and reason."""

import tomllib
from pathlib import Path

import msgspec
import pytest

from config import load
from config.settings import Settings
from domain.errors import ConfigurationError

EXAMPLE = Path(load.__file__).with_name("sluice.example.toml")


def problems_of(path: Path | None, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load.load(path, environ or {})
    return caught.value.problems


def written(directory: Path, text: str) -> Path:
    path = directory / "sluice.toml"
    path.write_text(text)
    return path


def test_without_file_and_variables_all_defaults_apply():
    assert load.load(None, {"HOME": "/nowhere", "PATH": "/bin"}) == Settings()


def test_the_example_shows_every_key_with_its_default_and_a_comment():
    shown = tomllib.loads(EXAMPLE.read_text())
    assert msgspec.convert(shown, Settings) == Settings()
    assert {name: list(section) for name, section in shown.items()} == {
        field.name: [inner.name for inner in msgspec.structs.fields(field.type)] for field in msgspec.structs.fields(Settings)
    }
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith(("queue_high_batches", "smtp_port", "http_port", "port")):
            continue  # said together with the key above
        if line and not line.startswith(("#", "[")):
            assert lines[number - 1].startswith("#"), f"line {number + 1} has no comment: {line}"


def test_the_example_is_accepted_without_warnings():
    assert load.check(EXAMPLE, {}) == (Settings(), [])


def test_a_variable_wins_over_the_file(tmp_path):
    path = written(tmp_path, "[engine]\nbatch_recipients = 100\nheld_batches = 2\n")
    settings = load.load(path, {"SLUICE_ENGINE__BATCH_RECIPIENTS": "250"})
    assert settings.engine.batch_recipients == 250
    assert settings.engine.held_batches == 2


@pytest.mark.parametrize("variable", ["SLUICE_DATABASE_URL", "SLUICE_DATABASE__URL"])
def test_one_underscore_is_as_good_as_two(variable):
    assert load.load(None, {variable: "postgresql://a/b"}).database.url == "postgresql://a/b"


def test_variables_become_numbers_and_lists():
    environ = {
        "SLUICE_REDIS__TIMEOUT_SECONDS": "2.5",
        "SLUICE_ENGINE_PROCESSES": "3",
        "SLUICE_INBOUND__RELAY_DOMAINS": "a.example, b.example",
        "SLUICE_ACCOUNTING__RECORDS": "d",
        "SLUICE_NODE__NAME": "",
    }
    settings = load.load(None, environ)
    assert (settings.redis.timeout_seconds, settings.engine.processes) == (2.5, 3)
    assert settings.inbound.relay_domains == ("a.example", "b.example")
    assert settings.accounting.records == ("d",)


def test_sluice_config_names_the_file(tmp_path):
    path = written(tmp_path, "[node]\nname = 'mx7'\n")
    assert load.load(None, {"SLUICE_CONFIG": str(path)}).node.name == "mx7"


def test_every_problem_is_reported_with_file_line_key_and_reason(tmp_path):
    path = written(
        tmp_path,
        "# a comment\n[engine]\nprocesess = 2\nheld_batches = -1\nlease_seconds = 'long'\n\n"
        "[databse]\nurl = 'x'\n[control]\nport = 70000\n",
    )
    assert problems_of(path) == [
        f"{path}, line 3: engine.procesess: unknown key; did you mean processes?",
        f"{path}, line 4: engine.held_batches: must be a whole number from 1 to 1000 (got -1)",
        f"{path}, line 5: engine.lease_seconds: must be a number from 0.01 to 86400 (got 'long')",
        f"{path}, line 7: databse: unknown section; did you mean database?",
        f"{path}, line 10: control.port: must be a whole number from 1 to 65535 (got 70000)",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[engine]\nbatch_recipients = 0", "engine.batch_recipients: must be a whole number from 1 to 5000 (got 0)"),
        ("[engine]\nbatch_recipients = 1000000000000", "from 1 to 5000"),
        ("[engine]\nbatch_recipients = true", "from 1 to 5000 (got True)"),
        ("[engine]\nbatch_recipients = 1.5", "from 1 to 5000 (got 1.5)"),
        ("[engine]\nlease_seconds = nan", "must be a number from 0.01 to 86400"),
        ("[engine]\nlease_seconds = inf", "must be a number from 0.01 to 86400"),
        ("[engine]\nlease_seconds = 4", "engine.lease_margin_seconds: must be less than lease_seconds (4)"),
        ("[engine]\nqueue_low_batches = 40", "must not be above queue_high_batches (16)"),
        ("[redis]\ntimeout_seconds = 0", "must be a number from 0.01"),
        ("[node]\nlog_level = 'loud'", "must be one of debug, error, info, warning (got 'loud')"),
        ('[node]\nname = "a\\nb"', "control character"),
        ("[node]\nname = 'ä b'", "letters, digits, dots"),
        ("[node]\nstate_directory = 7", "must be text (got 7)"),
        ("[accounting]\nrecords = ['d', 'x']", "must be a list of b, d, t"),
        ("[accounting]\nrecords = []", "at least one"),
        ("[journal]\ndisk_budget_bytes = 100000", "at least two segments"),
        ("[database]\nurl = 'mysql://root:hunter2@h/d'", "database.url: must be embedded:, postgresql://..., postgres://..."),
        ("[redis]\nurl = 'redis://h:99999/0'", "redis.url: is no URL, or its port"),
        ("[redis]\nurl = 'h:6379'", "redis.url: must be embedded:, redis://..."),
        ("[inbound]\npublic_url = 'mail.example'", "inbound.public_url: must be http://"),
        ("[inbound]\nhttp_port = 8025", "inbound.http_port: 8025 is the same as control.port"),
        ("[inbound]\nrelay_domains = ['no domain']", "'no domain' is not a domain name"),
        ("[mail]\nx_mailer = 'é'", "mail.x_mailer"),
        ("[mail]\ncomplaints_to = 'nobody'", "mail.complaints_to: must be an address"),
        ("[mail]\nlist_unsubscribe_to = 'left'", "such as complaints@%sender_domain%, or a URL such as https"),
        ("[mail]\nlist_unsubscribe_to = 'https:///left'", "mail.list_unsubscribe_to: names no host"),
        ("[mail]\nlist_unsubscribe_to = 'https://h:99999/'", "mail.list_unsubscribe_to: is no URL, or its port"),
        ("[mail]\nlist_unsubscribe_to = 'https://a:b@h/x'", "mail.list_unsubscribe_to: 'https://h/x' may hold no user, password"),
        ("[mail]\nlist_unsubscribe_to = 'https://%sender_domain%/x'", "users choose that domain"),
        ("[mail]\nlist_unsubscribe_to = 'https://h/a b'", "'https://h/a b' must be at most 2000 printable ASCII"),
        ("[mail]\ncfbl_address = 'a@b'", "mail.cfbl_address: must be an address"),
        ("[mail]\ncfbl_address = 'https://garden.example/fbl'", "mail.cfbl_address: must be an address"),
        ("[mail]\nfeedback_sender_id = 'a:b'", "mail.feedback_sender_id: must be 5 to 15"),
        ("[mail]\nsender_domain = 'a b'", "mail.sender_domain: 'a b' is not a domain name"),
        ("[mail]\nforbidden_from = ['hotmail']", "mail.forbidden_from: 'hotmail' matches no address"),
        ("[control]\nhost = 'a b'", "control.host: must be a host name or an address"),
        ("[control]\nadmin_key = 'short'", "control.admin_key: must have at least 16 characters"),
        ("[secrets]\nkey = 'abc'", "secrets.key: must be 64 hexadecimal digits"),
        ("engine = 3", "engine: is a section"),
        ("url = 'x'", "url: unknown key outside any section"),
        ("[engine", "line 1: not valid TOML"),
        ("[engine]\nprocesses = 1\nprocesses = 2", "line 3: not valid TOML"),
    ],
)
def test_a_bad_value_is_refused(tmp_path, text, reason):
    found = problems_of(written(tmp_path, text))
    assert any(reason in problem for problem in found), found
    assert all("sluice.toml" in problem or problem.startswith("defaults") for problem in found)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("SLUICE_ENGINE__PROCESESS", "2", "engine.procesess: unknown key; did you mean processes?"),
        ("SLUICE_NOTHING", "1", "no such setting; variables are SLUICE_SECTION__KEY, and sections are NODE, DATABASE"),
        ("SLUICE_DATABSE_URL", "x", "no such setting; did you mean SLUICE_DATABASE__URL?"),
        ("SLUICE_STATE_DIRECTORY", "/srv", "no such setting; did you mean SLUICE_NODE__STATE_DIRECTORY?"),
        ("SLUICE_NODE__STATE_DIRECTORY", "state", "must begin with / or ~"),
        ("SLUICE_REDIS__URL", "redis://h:6379/main", "names its database by a number"),
        ("SLUICE_ENGINE", "1", "no such setting"),
        ("SLUICE_ENGINE__PROCESSES", "two", "must be a whole number from 0 to 256 (got 'two')"),
        ("SLUICE_NODE__NAME", "mx1\nroot", "control character"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(variable, value, reason):
    (problem,) = problems_of(None, {variable: value})
    assert problem.startswith(f"{variable} (environment): ")
    assert reason in problem


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "cannot be read" in problems_of(tmp_path / "missing.toml")[0]
    assert "cannot be read" in problems_of(tmp_path)[0]
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"[node]\nname = '\xff'\n")
    assert "not UTF-8" in problems_of(binary)[0]


def test_no_message_repeats_a_secret(tmp_path):
    text = "[secrets]\nkey = 'hunter2hunter2'\n[control]\nadmin_key = 'hunter2'\n"
    text += "[database]\nurl = 'mysql://a:hunter2@h/d'\n[redis]\nurl = 42\n"
    found = problems_of(written(tmp_path, text), {"SLUICE_CONTROL__ADMIN_KEY": "hunter2 hunter2 hunter2"})
    assert len(found) == 4
    assert not any("hunter2" in problem for problem in found)


def test_secrets_in_clear_text_are_a_warning(tmp_path):
    text = f"[secrets]\nkey = '{'ab' * 32}'\n[control]\nadmin_key = '{'k' * 20}'\n[database]\nurl = 'postgresql://a:hunter2@h/d'\n"
    settings, warnings = load.check(written(tmp_path, text), {})
    assert settings.secrets.key == "ab" * 32
    assert [warning.split(": ")[1] for warning in warnings] == ["secrets.key", "control.admin_key", "database.url"]
    assert not any("hunter2" in warning or "abab" in warning for warning in warnings)
    assert load.check(None, {"SLUICE_SECRETS__KEY": "ab" * 32})[1] == []


def test_places_follow_from_the_state_directory(tmp_path):
    settings = load.load(None, {"SLUICE_NODE__STATE_DIRECTORY": str(tmp_path), "SLUICE_JOURNAL__DIRECTORY": "/fast/journal"})
    assert load.state_directory(settings) == tmp_path
    assert load.journal_root(settings) == Path("/fast/journal")
    assert load.accounting_path(settings) == tmp_path / "accounting" / "acct.csv"
    assert load.key_path(settings) == tmp_path / "secret.key"
    assert load.admin_key_path(settings) == tmp_path / "admin.key"


def test_the_state_directory_of_an_ordinary_user_follows_xdg(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/u/.state")
    assert load.state_directory(Settings()) == Path("/home/u/.state/sluice")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert load.state_directory(Settings()) == Path("/home/u/.local/state/sluice")
