"""What a recorder's user is told can be typed into a recorder."""

from __future__ import annotations

import pytest

from hessprobe.any_loop.words import for_recorder

SAID = {
    "--set cross_layer.method=products": '{"cross_layer": {"method": "products"}}',
    "set cross_layer.sequences=16": 'give {"cross_layer": {"sequences": 16}}',
    "--set 'preconditioner.curvature_sequences=[16,32]'": '{"preconditioner": {"curvature_sequences": [16, 32]}}',
    "fewer gn_hessian.sequences": 'fewer {"gn_hessian": {"sequences": ...}}',
    "go on with --resume": "go on with resume=True",
    "recipe key cross_layer.sequences = 1: too few": "option cross_layer.sequences = 1: too few",
    "hessprobe/probes/cross_layer.py:3, in measure": "hessprobe/probes/cross_layer.py:3, in measure",
}


@pytest.mark.parametrize("message", SAID)
def test_settings_and_flags_become_arguments_once(message):
    assert for_recorder(message) == SAID[message]
    assert for_recorder(SAID[message]) == SAID[message]
