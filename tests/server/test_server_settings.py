"""The server's settings: one value from four places, checked as a whole, that shows no secrets."""

from pathlib import Path

import pytest

from pusa.fields import field_specs
from pusa.server.settings import ServerSettings
from pusa.server.settings_sources import load_settings

KEY = "a-key-of-sixteen"


def test_every_option_says_what_it_is_and_what_it_may_be():
    known = {field.name: field for field in field_specs(ServerSettings)}
    assert known.keys() == ServerSettings.model_fields.keys()
    for option in known.values():
        assert option.help.endswith(".") or option.help.endswith("/.")
        if option.type in ("integer", "number"):
            assert option.range, option.name
            assert option.minimum <= option.default <= option.maximum
        elif option.default is None or option.default == []:
            assert option.unset, option.name


def test_the_default_is_a_private_server_with_the_embedded_model():
    settings = load_settings(environ={})
    assert (settings.host, settings.port, settings.model, settings.workers) == ("127.0.0.1", 7860, "mini", 1)
    assert settings == ServerSettings()
    assert settings.is_loopback


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path):
    file = tmp_path / "pusa.toml"
    file.write_text('port = 1\nqueue_limit = 2\nkeep_hours = 3\nlora = ["a", "b"]\nstudio = false\nhost = "::1"\n')
    environ = {
        "PUSA_QUEUE_LIMIT": "20",
        "PUSA_KEEP_HOURS": "30",
        "PUSA_LORA": "c, d,",
        "PUSA_DOCS": "No",
        "PUSA_DATA": "",
    }
    settings = load_settings(file, environ=environ, options={"keep_hours": 300, "port": None, "lora": (), "model": "x"})
    assert (settings.port, settings.queue_limit, settings.keep_hours) == (1, 20, 300)
    assert (settings.lora, settings.studio, settings.docs, settings.data) == (("c", "d"), False, False, None)
    assert (settings.model, settings.host) == ("x", "::1")
    assert load_settings(environ={"PUSA_CONFIG": str(file)}).port == 1


def test_the_places_of_things_follow_from_the_data_folder(tmp_path, monkeypatch):
    settings = load_settings(environ={}, options={"data": str(tmp_path)})
    assert settings.database_url == f"sqlite:///{tmp_path}/jobs.sqlite"
    assert (settings.files_url, settings.scratch_folder) == (f"{tmp_path}/files", tmp_path / "scratch")
    given = {"database": "postgresql://a@b/c", "files": "s3://bucket/x", "data": str(tmp_path)}
    settings = load_settings(environ={}, options=given)
    assert (settings.database_url, settings.files_url) == (given["database"], given["files"])
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert load_settings(environ={}).data_folder == tmp_path / "xdg/pusa"
    monkeypatch.setenv("XDG_DATA_HOME", "")
    assert load_settings(environ={}).data_folder == Path.home() / ".local/share/pusa"
    monkeypatch.chdir(tmp_path)
    assert load_settings(environ={}, options={"data": "here"}).data_folder == tmp_path / "here"


def test_results_may_be_kept_for_ever():
    assert load_settings(environ={"PUSA_KEEP_HOURS": "2"}).keep_seconds == 7200
    assert load_settings(environ={"PUSA_KEEP_HOURS": "0"}).keep_seconds is None


def test_every_problem_is_named():
    environ = {"PUSA_PORT": "high", "PUSA_LEASE_SECONDS": "1e9", "PUSA_STUDIO": "maybe", "PUSA_EXECUTOR": "slurm"}
    with pytest.raises(ValueError) as told:
        load_settings(environ=environ)
    assert str(told.value).splitlines() == [
        "port='high' is not a whole number",
        "studio='maybe' is neither true nor false",
        "executor='slurm' is none of local, ray",
        "lease_seconds=1000000000.0 is outside 0.2..3600",
    ]


def test_a_misspelt_option_is_refused_in_a_file_and_a_warning_in_the_environment(tmp_path, caplog):
    file = tmp_path / "pusa.toml"
    file.write_text("queue_limits = 3")
    with pytest.raises(ValueError, match=r"'queue_limits' is unknown: did you mean queue_limit\?"):
        load_settings(file, environ={})
    load_settings(environ={"PUSA_QUEUE_LIMITS": "3", "PUSA_API_KEY": KEY, "PUSA_CACHE": "x", "PUSA_OTHER_THING": "y"})
    assert caplog.messages == ["PUSA_QUEUE_LIMITS is unknown: did you mean PUSA_QUEUE_LIMIT?"]


def test_a_missing_or_malformed_settings_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no configuration"):
        load_settings(tmp_path / "none.toml", environ={})
    bad = tmp_path / "bad.toml"
    bad.write_text("port: 1")
    with pytest.raises(ValueError, match="is not TOML: "):
        load_settings(bad, environ={})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "[::]"])
def test_a_server_that_others_reach_needs_a_key(host):
    with pytest.raises(ValueError, match="can be reached by others and there is no API key"):
        load_settings(environ={"PUSA_HOST": host})
    for more in ({"PUSA_API_KEYS": KEY}, {"PUSA_INSECURE": "1"}):
        assert load_settings(environ={"PUSA_HOST": host, **more}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_a_server_of_this_machine_needs_none(host):
    assert load_settings(environ={"PUSA_HOST": host}).is_loopback


def test_keys_come_from_the_environment_and_from_a_file_and_are_never_shown(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{KEY}-2  # the second\n{KEY}-3\n")
    settings = load_settings(environ={"PUSA_API_KEYS": f"{KEY}-1", "PUSA_API_KEYS_FILE": str(file)})
    assert settings.api_keys == (f"{KEY}-1", f"{KEY}-2", f"{KEY}-3")
    settings = load_settings(environ={"PUSA_DATABASE": "postgresql://a:secret@b/c", "PUSA_API_KEYS": KEY})
    assert KEY not in repr(settings)
    assert "secret" not in repr(settings)


def test_a_bad_key_is_refused_without_showing_it(tmp_path):
    with pytest.raises(ValueError, match=r"an API key has 7 characters and needs 16: .*token_urlsafe") as told:
        load_settings(environ={"PUSA_API_KEYS": "hunter2"})
    assert "hunter2" not in str(told.value)
    file = tmp_path / "keys"
    with pytest.raises(FileNotFoundError, match="is not there: check its name and who may read it"):
        load_settings(environ={"PUSA_API_KEYS_FILE": str(file)})
    file.write_text("# none yet\n")
    with pytest.raises(ValueError, match="holds no key: write one a line"):
        load_settings(environ={"PUSA_API_KEYS_FILE": str(file)})
