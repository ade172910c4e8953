"""What a message tells a user to type, in the words of where it is shown: a recorder's arguments, not a command's flags.

Instruments and the store name a way out once, as the command line has it (--set cross_layer.method=products, --resume).
"""

from __future__ import annotations

import json
import re

from hessprobe.recipe import PROBES, parse_setting

_SECTION = "|".join(PROBES)
_SETTING = re.compile(rf"(?:--set )?(?<![\w.])'?({_SECTION})\.(\w+)=(\[[^\]]*\]|[^\s,;:)']+)'?")
_OPTION = re.compile(rf"(?:--set )?(?<![\w./])({_SECTION})\.(?!py\b)(\w+)\b(?! = )")
_FLAGS = {
    "--resume": "resume=True",
    "recipe key": "option",
    "recipe section": "options of",
    "set {": "give {",
    "--out": "folder=",
    "--seed": "seed=",
    "--every": "every=",
    "--probe": "probes=",
}


def for_recorder(text: str) -> str:
    """Returns a message with every setting and flag as a recorder's argument.

    >>> for_recorder("--set cross_layer.method=products")
    '{"cross_layer": {"method": "products"}}'
    """
    text = _SETTING.sub(lambda found: _option(found[1], found[2], _value(found[2], found[3])), text)
    text = _OPTION.sub(lambda found: _option(found[1], found[2], "..."), text)
    for flag, argument in _FLAGS.items():
        text = text.replace(flag, argument)
    return text


def _value(key: str, text: str) -> str:
    value = parse_setting(f"{key}={text}")[1]
    return json.dumps(value)


def _option(section: str, key: str, value: str) -> str:
    return f'{{"{section}": {{"{key}": {value}}}}}'
