"""The plain transformer as a fixture, because test folders are no packages."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def plain_dit():
    spec = importlib.util.spec_from_file_location("plain_dit", Path(__file__).with_name("plain_dit.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
