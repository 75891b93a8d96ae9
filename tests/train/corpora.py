"""Small corpora written by tiny targets, and what trains on them. Not a test."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from outpace.drafters.eagle import Eagle, Eagle3
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.ptp import Ptp
from outpace.train import Corpus, CorpusSettings, Trainer, TrainSettings, write_corpus
from outpace.train.prompts import PromptLine, PromptReport
from tiny import PROMPTS, target

SRC = Path(__file__).resolve().parents[2] / "src"
TESTS = Path(__file__).resolve().parents[1]
HELD_OUT = PromptLine("h0", "", [9, 9, 4, 9])  # its CRC-32 is a multiple of 50
LINES = [PromptLine(f"p{i}", "", prompt) for i, prompt in enumerate(PROMPTS)]


def corpus(folder, *, lines=LINES, temperatures=(0.0,), max_new_tokens=40, **options):
    """What the tiny llama answers."""
    settings = CorpusSettings(temperatures=temperatures, max_new_tokens=max_new_tokens, max_batch=8, **options)
    write_corpus(target(), PromptReport(prompts=list(lines)), folder, settings)
    return Corpus.load(folder)


MAKERS = {
    "eagle3": lambda: Eagle3(draft_len=4, branches=1, nodes=4, vocabulary=0),
    "eagle": lambda: Eagle(draft_len=4, branches=1, nodes=4, paths=(), regression=1.0),
    "mtp": lambda: MTP(draft_len=4, branches=1, nodes=4, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=3, nodes=3, paths=((0,), (0, 0), (0, 0, 0)), vocabulary=0),
    "medusa": lambda: Medusa(heads=3, nodes=3, paths=((0,), (0, 0), (0, 0, 0)), projection="own", vocabulary=0),
    "ptp": lambda: Ptp(mode="mask", sampler="eagle", slots=4, draft_len=4, rank=4, budget=64, min_gain=0.0),
}


def trainer(drafter, documents, out, *, recipe=None, ranks=None, **settings):
    """A trainer with a recipe fit for eight short dialogues."""
    small = {"tokens_per_step": 512, "row_length": 128, "rows": 2, "warmup": 0.1}
    drafter.recipe = drafter.recipe.replace(**{**small, **(recipe or {})})
    chosen = {"steps": 20, "optimizer": "adamw", "eval_every": 0, "save_every": 0, **settings}
    return Trainer(target(), drafter, documents, out, TrainSettings(**chosen), ranks=ranks)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run_in_two(script, *arguments):
    """Run a script in two processes that find one another, as ranks 0 and 1; both have to end well."""
    children, port = [], free_port()
    for rank in range(2):
        environment = {
            **os.environ, "PYTHONPATH": f"{SRC}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RANK": f"{rank}",
            "WORLD_SIZE": "2", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}",
        }  # fmt: skip
        command = [sys.executable, "-c", script, *arguments]
        children.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for child in children:
        error = child.communicate(timeout=240)[1]
        assert child.returncode == 0, error
