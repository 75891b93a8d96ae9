"""Corpora: prompts, and the answers the target itself gives to them, as token ids from end to end.

A corpus is a folder of safetensors shards named by what they hold (target, sampling, prompts), so that a run that was
stopped goes on where it was and never writes a shard twice, and a corpus.json that says how it came about. Ids go from
the engine to the trainer as they are: text that is decoded and encoded again has other token borders.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from outpace.drafters.checkpoint import describe_target
from outpace.drafters.learning import Origin
from outpace.engine import Engine, encode
from outpace.errors import CheckpointError, ConfigError
from outpace.laws import Settings
from outpace.train.files import whole_file

if TYPE_CHECKING:
    from outpace.engine import Output
    from outpace.target import Target
    from outpace.train.prompts import PromptReport

META: Final = "corpus.json"
FORMAT: Final = 1
FINISH: Final = {"length": 0, "eos": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """How answers are sampled.

    Attributes:
        temperatures: one answer per prompt for each; the mixture drafters will serve. A temperature may be named twice.
        top_k, top_p, min_p: truncation, as in serving.
        max_new_tokens: longest answer. max_prompt: longest prompt; longer ones are left out and counted.
        seed: of the noise. shard: answers per file. max_batch: answers in one pass.
    """

    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    max_new_tokens: int = 512
    max_prompt: int = 1024
    seed: int = 0
    shard: int = 1024
    max_batch: int = 64

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("a corpus needs at least one temperature, e.g. --temperatures 0,0.7,1")
        if self.shard < 1 or self.max_batch < 1 or self.max_prompt < 1:
            raise ConfigError("shard, max_batch and max_prompt must be at least 1")
        for temperature in set(self.temperatures):
            self.sampling(temperature, 0)  # refuses what cannot be before anything is loaded

    def sampling(self, temperature: float, request: int) -> Settings:
        """Settings of one answer (truncation has no effect on a greedy one)."""
        cut: dict[str, Any] = (
            {} if temperature == 0 else {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        )
        return Settings(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=self.seed, request=request, **cut
        )

    @property
    def origin(self) -> Origin:
        """What training is told of the sampling."""
        return Origin(seed=self.seed, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to be written: prompt ids, temperature, request in the noise key."""

    id: str
    prompt: tuple[int, ...]
    temperature: float
    request: int


@dataclass(slots=True)
class CorpusReport:
    """What a run of `write_corpus` did.

    Attributes:
        answers, tokens: written by this run. found: shards that were there already. written, left: shards.
        empty: answers without a token but the end. long_prompts: prompts left out. repeated: prompts equal to another
        in ids, left out. seconds: generating.
    """

    answers: int = 0
    tokens: int = 0
    found: int = 0
    written: int = 0
    left: int = 0
    empty: int = 0
    long_prompts: int = 0
    repeated: int = 0
    seconds: float = 0.0


def write_corpus(
    target: Target,
    prompts: PromptReport,
    folder: str | Path,
    settings: CorpusSettings | None = None,
    *,
    minutes: float = 0.0,
    sources: Sequence[str] = (),
    progress: Callable[[CorpusReport, int], None] | None = None,
) -> CorpusReport:
    """Let the target answer every prompt at every temperature; shards that exist are kept.

    Args:
        target: whose answers are wanted.
        prompts: from `read_prompts`. Held-out prompts are stored, and not answered.
        folder: of the corpus; created, or continued.
        settings: how answers are sampled.
        minutes: stop after so long (0: when done); what is complete by then is a corpus.
        sources: names of the prompt files, for the record.
        progress: called now and then with the report and the number of jobs in all.

    Raises:
        CheckpointError: if the folder holds a corpus of another target or sampling, or cannot be written.
    """
    settings = settings or CorpusSettings()
    path = Path(folder)
    report = CorpusReport()
    jobs, held_out = _jobs(target, prompts, settings, report)
    meta = _open(path, target, settings, prompts, sources, held_out)
    longest = max(map(len, jobs))
    shards = [
        copies[i : i + settings.shard] for i in range(0, longest, settings.shard) for copies in jobs if i < len(copies)
    ]
    names = [_shard_name(meta, shard) for shard in shards]
    wanted = [i for i, name in enumerate(names) if not (path / name).is_file()]
    report.found = len(shards) - len(wanted)
    _generate(target, path, settings, [(names[i], shards[i]) for i in wanted], report, minutes, progress)
    report.left = len(wanted) - report.written
    return report


def _jobs(
    target: Target, prompts: PromptReport, settings: CorpusSettings, report: CorpusReport
) -> tuple[list[list[Job]], list[tuple[str, list[int]]]]:
    """(answers to write, a list per temperature, each in an order that is representative; held-out prompts)."""
    held_out: list[tuple[str, list[int]]] = []
    copies: list[list[Job]] = [[] for _ in settings.temperatures]
    seen: set[tuple[int, ...]] = set()  # two texts may be one prompt in ids, and would share a request
    for line in prompts.prompts:
        ids = encode(target, line.content)
        if len(ids) > settings.max_prompt:
            report.long_prompts += 1
        elif tuple(ids) in seen:
            report.repeated += 1
        elif line.held_out:
            held_out.append((line.id, ids))
        else:
            seen.add(tuple(ids))
            for number, temperature in enumerate(settings.temperatures):
                again = settings.temperatures[:number].count(temperature)
                what = np.asarray([round(temperature * 1e6), again, settings.seed, *ids], np.int64)
                request = int.from_bytes(hashlib.sha256(what.tobytes()).digest()[:8], "little") >> 1  # fits int64
                copies[number].append(Job(line.id, tuple(ids), temperature, request))
    for jobs in copies:
        jobs.sort(key=lambda job: job.request)
    return copies, held_out


def _shard_name(meta: dict[str, Any], jobs: Sequence[Job]) -> str:
    """Content address: what the target is, how it is sampled, and which prompts it answers."""
    digest = hashlib.sha256(json.dumps([_identity(meta["target"]), meta["sampling"]], sort_keys=True).encode())
    for job in jobs:
        digest.update(np.asarray([job.request, round(job.temperature * 1e6), *job.prompt], np.int64).tobytes())
    return f"{digest.hexdigest()[:24]}.safetensors"


def _open(
    path: Path,
    target: Target,
    settings: CorpusSettings,
    prompts: PromptReport,
    sources: Sequence[str],
    held_out: Sequence[tuple[str, Sequence[int]]],
) -> dict[str, Any]:
    """Write corpus.json, or check that the one in the folder is of the same making."""
    sampling = {k: v for k, v in asdict(settings).items() if k not in ("shard", "max_batch", "temperatures")}
    meta = {
        "format": FORMAT,
        "target": describe_target(target),
        "sampling": json.loads(json.dumps(sampling)),
        "temperatures": list(settings.temperatures),
        "sources": list(sources),
        "prompts": prompts.as_dict(),
        "held_out": [{"id": name, "tokens": list(ids)} for name, ids in held_out],
    }
    if (path / META).is_file():
        old = read_meta(path)
        for key, was, now in (
            ("target", _identity(old["target"]), _identity(meta["target"])),
            ("sampling", old["sampling"], meta["sampling"]),
        ):
            if was != now:
                differs = next(k for k in now if was.get(k) != now[k])
                raise CheckpointError(
                    f"{str(path)!r} holds a corpus whose {key} has {differs} = {was.get(differs)!r}, and "
                    f"{now[differs]!r} is asked for; write to another folder"
                )
        meta["temperatures"] = sorted({*old["temperatures"], *settings.temperatures})
        known = {entry["id"] for entry in old["held_out"]}
        meta["held_out"] = old["held_out"] + [entry for entry in meta["held_out"] if entry["id"] not in known]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with whole_file(path / META) as temporary:
            temporary.write_text(json.dumps(meta) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write a corpus to {str(path)!r}: {error}") from error
    return meta


def _generate(
    target: Target,
    path: Path,
    settings: CorpusSettings,
    shards: Sequence[tuple[str, Sequence[Job]]],
    report: CorpusReport,
    minutes: float,
    progress: Callable[[CorpusReport, int], None] | None,
) -> None:
    total = sum(len(jobs) for _, jobs in shards)
    silent = copy.copy(target)
    silent.tokenizer = None  # answers end by ids; turning each into text costs more than the pass
    engine = Engine(silent, None, max_batch=settings.max_batch)
    started = time.perf_counter()
    waiting = iter([(number, job) for number, (_, jobs) in enumerate(shards) for job in jobs])
    where: dict[int, tuple[int, Job]] = {}
    answers: list[dict[int, Output]] = [{} for _ in shards]
    told = started
    while True:
        while engine.active < 2 * settings.max_batch and (item := next(waiting, None)) is not None:
            number, job = item
            where[engine.submit(list(job.prompt), settings.sampling(job.temperature, job.request))] = (number, job)
        for one in engine.step():
            if one.chunk.output is None:
                continue
            number, job = where.pop(one.uid)
            answers[number][job.request] = one.chunk.output
            report.answers += 1
            report.tokens += len(one.chunk.output.tokens)
            if len(answers[number]) == len(shards[number][1]):
                _write_shard(path / shards[number][0], shards[number][1], answers[number], target.eos, report)
                answers[number] = {}
        now = time.perf_counter()
        report.seconds = now - started
        if progress is not None and now - told > 0.5:
            told = now
            progress(report, total)
        if not engine.active or (minutes and report.seconds > 60 * minutes):
            break
    engine.close()


def _write_shard(
    file: Path, jobs: Sequence[Job], answers: dict[int, Output], eos: Sequence[int], report: CorpusReport
) -> None:
    tokens: list[int] = []
    starts, prompts, requests, temperatures, finish, ids = [0], [], [], [], [], []
    for job in jobs:
        output = answers[job.request]
        if not output.tokens or output.tokens[0] in eos:
            report.empty += 1
            continue
        tokens.extend(job.prompt)
        tokens.extend(output.tokens)
        starts.append(len(tokens))
        prompts.append(len(job.prompt))
        requests.append(job.request)
        temperatures.append(job.temperature)
        finish.append(FINISH[output.finish_reason])
        ids.append(job.id)
    tensors = {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "starts": torch.tensor(starts, dtype=torch.int64),
        "prompt": torch.tensor(prompts, dtype=torch.int32),
        "request": torch.tensor(requests, dtype=torch.int64),
        "temperature": torch.tensor(temperatures, dtype=torch.float32),
        "finish": torch.tensor(finish, dtype=torch.uint8),
    }
    try:
        with whole_file(file) as temporary:
            save_file(tensors, temporary, metadata={"ids": json.dumps(ids)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {str(file)!r}: {error}; shards written so far stay. Free some space and run it again"
        ) from error
    report.written += 1


def _identity(target: dict[str, Any]) -> dict[str, Any]:
    """What makes a target the same wherever it was loaded from."""
    return {key: value for key, value in target.items() if key not in ("name", "embedding_norm")}


def read_meta(folder: str | Path) -> dict[str, Any]:
    """A corpus's corpus.json.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = Path(folder)
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no corpus in {str(path)!r}: {error}; write one with outpace corpus") from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"the corpus in {str(path)!r} has format {meta.get('format')}, not {FORMAT}")
    return meta


@dataclass(frozen=True)
class Corpus:
    """Every document of a folder, in memory (8 bytes a token): prompt and answer, one behind the other.

    Attributes:
        tokens: [N] int32. starts: [D + 1] int64. prompt: [D] int64 prompt tokens of each document.
        request: [D] int64. temperature: [D] float32. meta: corpus.json. digest: of the shards' names.
        dropped: documents left out, by reason.
    """

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    prompt: np.ndarray[Any, np.dtype[np.int64]]
    request: np.ndarray[Any, np.dtype[np.int64]]
    temperature: np.ndarray[Any, np.dtype[np.float32]]
    meta: dict[str, Any]
    digest: str
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def load(cls, folder: str | Path, *, limit: int = 0) -> Corpus:
        """Read a corpus; `limit` keeps the first so many documents (0: all).

        Raises:
            CheckpointError: if there is none, a shard is damaged, or nothing is in it.
        """
        path = Path(folder)
        meta = read_meta(path)
        files = sorted(path.glob("*.safetensors"))
        parts: dict[str, list[Any]] = {k: [] for k in ("tokens", "prompt", "request", "temperature", "length")}
        for file in files:
            try:
                with safe_open(file, "np") as shard:
                    for name in ("tokens", "prompt", "request", "temperature"):
                        parts[name].append(shard.get_tensor(name))
                    parts["length"].append(np.diff(shard.get_tensor("starts")))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(
                    f"shard {file.name} of the corpus in {str(path)!r} is damaged ({error}); delete it and run outpace "
                    "corpus again, which writes it anew"
                ) from error
        if not files:
            raise CheckpointError(f"the corpus in {str(path)!r} has no shard yet; run outpace corpus to the first one")
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        count = len(joined["prompt"]) if not limit else min(limit, len(joined["prompt"]))
        starts = np.concatenate([[0], np.cumsum(joined["length"])])[: count + 1].astype(np.int64)
        return cls(
            joined["tokens"][: starts[-1]].astype(np.int32),
            starts,
            joined["prompt"][:count].astype(np.int64),
            joined["request"][:count].astype(np.int64),
            joined["temperature"][:count].astype(np.float32),
            meta,
            hashlib.sha256("\n".join(file.name for file in files).encode()).hexdigest()[:16],
        )

    @property
    def origin(self) -> Origin:
        """How it was sampled."""
        sampling = self.meta["sampling"]
        return Origin(**{key: sampling[key] for key in ("seed", "top_k", "top_p", "min_p")})

    @property
    def held_out(self) -> list[list[int]]:
        """Prompts, as ids, that were never answered for training."""
        return [entry["tokens"] for entry in self.meta["held_out"]]

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[D] tokens of each document."""
        return np.diff(self.starts)

    def answer_counts(self, vocabulary: int) -> torch.Tensor:
        """[V] int64: how often each token occurs in answers."""
        place = np.arange(len(self.tokens)) - np.repeat(self.starts[:-1], self.lengths())
        answers = self.tokens[place >= np.repeat(self.prompt, self.lengths())]
        return torch.from_numpy(np.bincount(answers, minlength=vocabulary).astype(np.int64))

    def documents(self) -> Iterator[tuple[list[int], int]]:
        """(ids, prompt length) of each document."""
        for i in range(len(self)):
            yield self.tokens[self.starts[i] : self.starts[i + 1]].tolist(), int(self.prompt[i])

    def check_fit(self, target: Target) -> None:
        """Refuse a corpus another target wrote.

        Raises:
            CheckpointError: saying what differs.
        """
        found = describe_target(target)
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "tokenizer_sha256", "template_sha256"):
            if self.meta["target"][key] != found[key]:
                raise CheckpointError(
                    f"this corpus was written by {self.meta['target']['name']!r}, whose {key} is "
                    f"{self.meta['target'][key]}; that of {found['name']!r} is {found[key]}. A drafter learns its own "
                    "target's answers: run outpace corpus for this target"
                )
