"""Instruments of installed packages: in their place, once; what cannot be had is said and left out."""

from __future__ import annotations

import sys

import pytest

from hessprobe.errors import UserError
from hessprobe.instruments import registry
from hessprobe.instruments.instrument import Instrument
from tests.instruments.strangers import WEIGHTS, install


@pytest.fixture
def installing(tmp_path, monkeypatch):
    """Installs a package for one test."""
    installed = []

    def put(module: str, source: str, points: dict[str, str] | None = None) -> None:
        monkeypatch.syspath_prepend(str(install(tmp_path / module, module, source, points)))
        installed.append(module)
        registry.instruments.cache_clear()

    yield put
    registry.instruments.cache_clear()
    for module in installed:
        sys.modules.pop(module, None)


def test_strangers_come_after_ours_and_before_the_table_of_every_run(installing):
    installing("weights_of_mine", WEIGHTS)
    assert [*registry.instruments()] == [*registry.OURS, "weights", registry.EVERY_RUN]
    assert [*registry.probed()] == [*registry.OURS, "weights"]
    assert registry.instrument_named("weights").title == "Weights"
    with pytest.raises(UserError, match="no probe named 'weigths'. Did you mean 'weights'"):
        registry.instrument_named("weigths")


@pytest.mark.parametrize(
    ("source", "points", "said"),
    [
        ("import no_such_module\nINSTRUMENT = 1", None, "left out: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise SystemError('torn')", None, "left out: SystemError: torn"),
        ("INSTRUMENT = 'an instrument'", None, "left out: wanted an Instrument, got str"),
        ("", {"mine": "broken:NOTHING"}, "left out: AttributeError"),
        (WEIGHTS.replace('name="weights",\n    title', 'name="gn_hessian",\n    title'), None,
         "left out: there is another instrument named 'gn_hessian'"),
        (WEIGHTS, {"mine": "broken:INSTRUMENT", "again": "broken:INSTRUMENT"},
         "left out: there is another instrument named 'weights'"),
    ],
)  # fmt: skip
def test_a_broken_or_duplicate_one_is_said_once_and_left_out(installing, source, points, said):
    installing("broken", source, points)
    with pytest.warns(UserWarning, match=said) as warned:  # noqa: PT031 (asked twice, said once)
        assert set(registry.OURS) < set(registry.instruments())
        registry.instruments()
    assert len(warned) == 1 and "of broken" in str(warned[0].message)


def test_an_instrument_needs_a_plain_name_and_settings_for_its_probe():
    with pytest.raises(ValueError, match="letters, digits"):
        Instrument(name="my instrument", title="", table="a:b")
    with pytest.raises(ValueError, match="a probe needs settings"):
        Instrument(name="mine", title="", table="a:b", probe="a:b")


def test_a_table_that_no_instrument_knows_is_read_all_the_same():
    reader = registry.reader_of("foreign_table")
    assert reader.title == "foreign table" and reader.quantities() == ()
