"""A test whose needs are not met is skipped with its reason, and fails where PUSA_REQUIRE names them."""

import pytest
from needs import missing, needed_module


def test_what_is_missing_is_skipped_unless_it_is_required(monkeypatch):
    monkeypatch.setenv("PUSA_REQUIRE", "ray,chromium")
    with pytest.raises(pytest.skip.Exception, match="postgresql: initdb is not there"):
        missing("postgresql", "initdb is not there")
    with pytest.raises(pytest.fail.Exception, match="chromium is required here and nothing is on the PATH"):
        missing("chromium", "nothing is on the PATH")
    with pytest.raises(pytest.skip.Exception, match="no_such_module: it is not installed: pip install it"):
        needed_module("no_such_module", "pip install it")
    assert needed_module("pytest", "") is pytest
