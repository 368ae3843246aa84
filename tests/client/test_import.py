"""The package's own names: there when they are used, and nothing is imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

import clockwork_client as client
import clockwork_serve
import clockwork_serve.client as old


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_alone_imports_nothing_heavy():
    heavy = ("numpy", "msgspec", "asyncio", "httptools", "clockwork_client")

    assert fresh(f"import sys, clockwork_serve; print([m for m in {heavy!r} if m in sys.modules])") == "[]"


def test_the_client_does_not_import_the_server():
    heavy = ("onnx", "onnxruntime", "grpc", "google.protobuf", "uvloop", "ssl", "clockwork_serve.serve")
    code = (
        f"import sys; from clockwork_serve import Client; print([m for m in {heavy!r} if m in sys.modules])"
    )

    assert fresh(code) == "[]"  # ssl is imported for an address that asks for it


def test_the_client_is_a_package_of_its_own_and_the_servers_names_are_its():
    code = (
        "import sys; from clockwork_client import AsyncClient, Client; Client('127.0.0.1:1').close(); "
        "print([m for m in sys.modules if m.startswith('clockwork_serve')])"
    )

    assert fresh(code) == "[]"
    assert {name: getattr(old, name) for name in old.__all__} == {
        name: getattr(client, name) for name in client.__all__
    }


@pytest.mark.parametrize("name", sorted(set(clockwork_serve.__all__) - {"__version__"}))
def test_every_name_is_the_clients(name):
    assert getattr(clockwork_serve, name) is getattr(client, name)
    assert name in dir(clockwork_serve)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sever'"):
        clockwork_serve.Sever  # noqa: B018 - looked at, not used
