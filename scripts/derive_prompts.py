"""Prompts about texts, made of a corpus the target has written: summaries, questions behind documents, translations.

    python scripts/derive_prompts.py CORPUS OUT.jsonl [--german FILE.po ...] [--count 9000]

Public prompt sets ask short questions. A drafter that has only seen those is poor behind a long prompt, where copying
pays. The texts are the target's own answers, so no licence but that of the first prompts is touched; German sentences
come from translation files (.po) of programs, under the licences of those.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any

from outpace.target import Target
from outpace.train import Corpus

SUMMARIES = (
    "Summarize: {text}",
    "Summarize the following text in a few sentences.\n\n{text}",
    "Give a short summary of this article:\n{text}",
    "{text}\n\nWhat are the main points of the text above?",
)
QUESTIONS = (
    "{documents}\n{question}",
    "Documents:\n{documents}\n\nQuestion: {question}",
    "Answer the question with the help of these passages.\n\n{documents}\n\n{question}",
)
INTO_ENGLISH = (
    "Translate German to English: {text}",
    "Translate this sentence from German to English.\n{text}",
    "What does this German sentence mean in English? {text}",
)
FROM_ENGLISH = (
    "Translate English to German: {text}",
    "Translate to French: {text}",
    "Translate the following sentence to Spanish: {text}",
)


def passages(corpus: Corpus, tokenizer: Any, most: int) -> list[tuple[str, str]]:
    """(question, answer) texts of a corpus: prose that was not sampled hot."""
    found = []
    for (ids, prompt), temperature in zip(corpus.documents(), corpus.temperature, strict=True):
        if len(found) == most:
            break
        if temperature > 0.8:
            continue
        answer = tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()
        question = tokenizer.decode(ids[:prompt], skip_special_tokens=True)
        question = re.split(r"\buser\n", question)[-1].rsplit("\nassistant", 1)[0].strip()
        digits = sum(letter.isdigit() for letter in answer)
        if len(answer) > 200 and "```" not in answer and digits < len(answer) / 50 and len(question) < 400:
            found.append((question, answer))
    return found


def german_sentences(files: list[Path]) -> list[str]:
    """Translations of whole sentences in .po files, placeholders left out."""
    found: list[str] = []
    for file in files:
        for block in re.findall(r'^msgstr ((?:".*"\n?)+)', file.read_text(), re.MULTILINE):
            text = "".join(re.findall(r'"(.*)"', block)).replace("\\n", " ").replace('\\"', '"')
            if 25 < len(text) < 300 and not re.search(r"[%{}<>\\]", text):
                found.append(" ".join(text.split()))
    return sorted(set(found))


def main() -> None:
    """Write the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2", help="the target, for its tokenizer")
    parser.add_argument("--german", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=9000)
    options = parser.parse_args()
    rng = random.Random(0)
    texts = passages(
        Corpus.load(options.corpus), Target.from_pretrained(options.model, device="cpu").tokenizer, 2 * options.count
    )
    german = german_sentences(options.german)
    rng.shuffle(texts)
    rng.shuffle(german)
    lines: list[tuple[str, str]] = []
    share = options.count // 20
    for number in range(8 * share):
        text = "\n".join(answer for _, answer in rng.sample(texts, rng.choice((1, 2, 2, 3, 3))))
        lines.append(("summary", SUMMARIES[number % len(SUMMARIES)].format(text=text[: rng.randint(800, 4500)])))
    for number in range(7 * share):
        chosen = rng.sample(texts, rng.choice((1, 2, 3, 3)))
        documents = "\n".join(answer[:1300] for _, answer in rng.sample(chosen, len(chosen)))
        lines.append(
            ("retrieval", QUESTIONS[number % len(QUESTIONS)].format(documents=documents, question=chosen[0][0]))
        )
    for number, text in enumerate(german[: 3 * share]):
        more = f" {rng.choice(german)}" if rng.random() < 0.3 else ""
        lines.append(("translation", INTO_ENGLISH[number % len(INTO_ENGLISH)].format(text=text + more)))
    for number in range(2 * share):
        sentences = re.findall(r"[A-Z][^.!?\n]{30,200}[.!?]", rng.choice(texts)[1])
        if sentences:
            lines.append(("translation", FROM_ENGLISH[number % len(FROM_ENGLISH)].format(text=rng.choice(sentences))))
    rng.shuffle(lines)
    with options.out.open("w") as out:
        for number, (domain, prompt) in enumerate(lines):
            out.write(json.dumps({"id": f"derived-{number:05d}", "domain": domain, "prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
