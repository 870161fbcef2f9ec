"""YAML as recipes are written: 3e-6 is a number (plain YAML 1.1 wants 3.0e-6), and "3e-6" in quotes is text."""

from __future__ import annotations

import re
from typing import Any

import yaml

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+$")


class _Loader(yaml.SafeLoader):
    """Reads such numbers."""


class _Dumper(yaml.SafeDumper):
    """Puts text that looks like such a number in quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-0123456789"))


def parse(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def dump(value: Any) -> str:
    """With keys in the order in which they stand."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
