"""What callbacks take is what a recorder takes, and a misspelt argument is told when the callback is made."""

from __future__ import annotations

import inspect

import pytest

from hessprobe.any_loop.recorder import Recorder
from hessprobe.integrations.hosting import CallbackArguments, Hosted


def test_callbacks_take_what_a_recorder_takes():
    assert set(CallbackArguments.__annotations__) <= set(inspect.signature(Recorder).parameters)


def test_an_argument_of_another_name_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="no argument 'evry'; it takes every, partition"):
        Hosted(tmp_path / "run", "cross_layer", evry=5)  # type: ignore[call-arg]
    assert not (tmp_path / "run").exists()


def test_what_is_not_said_is_as_a_recorder_has_it(tmp_path):
    parameters = inspect.signature(Recorder).parameters
    held = Hosted(tmp_path / "run", "cross_layer")
    assert {name: held.settings[name] for name in ("every", "partition", "sequences")} == {
        name: parameters[name].default for name in ("every", "partition", "sequences")
    }
    assert (held.objective, held.arguments) == (None, {})
