"""Targets, suites and a runner for fake methods."""

import dataclasses
import json

import pytest
import torch

from fakes import FakeClock
from outpace import Target
from outpace.bench.ledger import Ledger
from outpace.bench.methods import PLAIN
from outpace.bench.runner import Watch
from outpace.bench.session import _Run
from outpace.bench.suites import load_suite


@pytest.fixture(autouse=True)
def _small_floor(monkeypatch):
    """Bandwidth is measured on a buffer of a megabyte here: no figure of a test is meant to be read."""
    monkeypatch.setattr("outpace.bench.machine._READ_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture(scope="session")
def spoken(model_dir):
    return Target.from_pretrained(model_dir, dtype=torch.float32, device="cpu")


@pytest.fixture
def write_suite(tmp_path):
    """A suite file from {task: [turns, ...]}."""

    def write(tasks):
        path = tmp_path / "own.jsonl"
        lines = [json.dumps({"task": t, "turns": turns}) for t, questions in tasks.items() for turns in questions]
        path.write_text("\n".join(lines) + "\n")
        return load_suite(str(path))

    return write


@pytest.fixture
def suite(write_suite):
    return write_suite({"chat": [["hello", "again"], ["abc"], ["xyz"]], "code": [["def f"], ["def g"], ["def h"]]})


@pytest.fixture
def play(spoken):
    """Run fake methods through the real runner, audit and derivation."""

    def run(methods, config, suite, clock, ledger=None, target=spoken, **options):
        assert methods[0].name == PLAIN
        one = _Run(target, methods, dataclasses.replace(config, replays=0), suite, ledger or Ledger(), Watch(), None)
        one.runner.clock = clock
        for name, value in options.items():
            setattr(one.runner, name, value)
        return one.result()

    return run
