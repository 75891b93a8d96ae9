import subprocess
import sys

import pytest

import outpace


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    loaded = run(
        "import sys, outpace; print([m for m in ('torch', 'transformers', 'numpy', 'typer') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_changes_nothing():
    code = (
        "import os, torch, logging; before = (dict(os.environ), torch.get_num_threads(), torch.initial_seed(),"
        " logging.getLogger().handlers[:]); import outpace.engine, outpace.target, outpace.drafters, outpace.laws;"
        " after = (dict(os.environ), torch.get_num_threads(), torch.initial_seed(), logging.getLogger().handlers[:]);"
        " print(before == after)"
    )
    assert run(code) == "True"


def test_public_names_resolve():
    for name in outpace.__all__:
        assert getattr(outpace, name) is not None
    assert set(outpace.__all__) <= set(dir(outpace))
    with pytest.raises(AttributeError, match="has no attribute 'Engin'"):
        _ = outpace.Engin
