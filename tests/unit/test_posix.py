"""A system that cannot train says so, and names the remedy."""

import builtins
import importlib
import sys

import pytest


def test_a_system_without_posix_locks_is_named_with_the_remedy(monkeypatch):
    real = builtins.__import__

    def without_locks(name, *args, **kwargs):
        if name == "fcntl":
            raise ImportError("No module named 'fcntl'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "silkie.io.posix", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_locks)
    with pytest.raises(ImportError, match="On Windows use WSL 2"):
        importlib.import_module("silkie.io.posix")
