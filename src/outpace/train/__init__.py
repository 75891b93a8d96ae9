"""Training: corpora the target writes itself, features it computes on the way, one loop."""

from outpace.train.corpus import Corpus, CorpusReport, CorpusSettings, write_corpus
from outpace.train.loop import Trainer, TrainSettings
from outpace.train.prompts import PromptReport, read_prompts
from outpace.train.tune import Candidate, tune_shapes

__all__ = [
    "Candidate",
    "Corpus",
    "CorpusReport",
    "CorpusSettings",
    "PromptReport",
    "TrainSettings",
    "Trainer",
    "read_prompts",
    "tune_shapes",
    "write_corpus",
]
