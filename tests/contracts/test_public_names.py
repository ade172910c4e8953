"""A public name is a promise: none goes away unnoticed, and a new one is written down."""

from __future__ import annotations

import pytest

from tests.contracts.public_names import FILE, HEADINGS, listed, public_names


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return public_names()


@pytest.mark.parametrize("kind", HEADINGS)
def test_no_public_name_is_gone(found, kind):
    gone = sorted(set(listed()[kind]) - set(found[kind]))
    assert not gone, f"{HEADINGS[kind]}: promised, and no longer there: {', '.join(gone)}"


@pytest.mark.parametrize("kind", HEADINGS)
def test_every_public_name_is_listed(found, kind):
    new = sorted(set(found[kind]) - set(listed()[kind]))
    assert not new, (
        f"{HEADINGS[kind]}: not in {FILE.name}: {', '.join(new)}. If they are to be public, "
        "python -m tests.contracts.public_names adds them"
    )
    assert len(found[kind]) > 30
