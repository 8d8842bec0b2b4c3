"""The commands convert as the function does."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

import normfree
from normfree.commands.convert import Convert, Doctor


@pytest.mark.parametrize("command", [Convert, Doctor])
def test_the_defaults_are_the_same(command):
    of_the_function = {name: p.default for name, p in inspect.signature(normfree.convert).parameters.items()}
    of_the_command = {field.name: field.default for field in fields(command)}
    shared = {"start", "alpha", "skip_gain", "beta", "seed"}
    assert {name: of_the_command[name] for name in shared} == {name: of_the_function[name] for name in shared}
