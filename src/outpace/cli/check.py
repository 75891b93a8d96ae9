"""`outpace check`: the certificate, and the parity audit on a real model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outpace.cli.options import (
    DID_NOT_HOLD,
    Debug,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Seed,
    TrustRemoteCode,
    load_target,
)
from outpace.cli.render import console, table, tell, verdict, write_json
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.engine import AuditReport
    from outpace.laws.certificate import Finding
    from outpace.target import Target

TEMPERATURES = (0.0, 0.8)


def check(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Also audit this model.")] = None,
    model_flag: Annotated[str | None, typer.Option("--model", "-m", help="The same, as a flag.")] = None,
    drafter: Annotated[
        str, typer.Option("--drafter", "-d", help="Drafters to audit, separated by commas.")
    ] = "prompt_lookup,suffix",
    max_new_tokens: MaxNewTokens = 48,
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One pair of toy models per case instead of three.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prove the rules exact, audit drafters on a model.

    The rules are proved by enumeration; with a MODEL, drafters are audited on it. Exit code 3 if anything fails.
    """
    name = _one_model(model, model_flag)
    names = split_drafters(drafter)
    from outpace.drafters import make_drafter
    from outpace.laws import Settings

    for spec in names:
        if make_drafter(spec) is None:
            raise ConfigError("'none' is plain decoding, which the audit compares with; name drafters, e.g. suffix")
    settings = Settings(max_new_tokens=max_new_tokens, seed=seed)

    models = 1 if quick else 3
    certificate, broken = _certify(models, silent=as_json)
    reports: list[AuditReport] = []
    if name is not None:
        target = load_target(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        reports = _audit(target, names, settings, silent=as_json)
    holds = all(f.holds for f in (*certificate, *broken)) and all(report.holds for report in reports)
    if as_json:
        write_json(
            {
                "holds": holds,
                "certificate": {
                    "models_per_case": models,
                    "holds": all(f.holds for f in certificate),
                    "largest_distance": max(f.distance for f in certificate),
                    "cases": [dataclasses.asdict(f) for f in certificate],
                },
                "broken_rules": {
                    "all_caught": all(f.holds for f in broken),
                    "smallest_distance": min(f.distance for f in broken),
                    "cases": [dataclasses.asdict(f) for f in broken],
                },
                "audits": [report.as_dict() for report in reports],
            }
        )
    else:
        console().print("everything holds" if holds else "NOT everything holds")
    if not holds:
        raise typer.Exit(DID_NOT_HOLD)


def _one_model(positional: str | None, flag: str | None) -> str | None:
    if positional is not None and flag is not None and positional != flag:
        raise ConfigError(f"two models named, {positional!r} and --model {flag!r}; name one")
    return positional if positional is not None else flag


def split_drafters(text: str) -> list[str]:
    """Drafter specs separated by commas, where commas also separate a drafter's own options.

    An item with "=" and without ":" belongs to the spec before it: "suffix:draft_len=8,max_depth=4,lookahead" is two.

    Raises:
        ConfigError: if there is none.
    """
    specs: list[str] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if specs and "=" in item and ":" not in item and ":" in specs[-1]:
            specs[-1] += f",{item}"
        else:
            specs.append(item)
    if not specs:
        raise ConfigError("--drafter is empty; name one or more, e.g. --drafter prompt_lookup,suffix")
    return specs


def _certify(models: int, *, silent: bool) -> tuple[list[Finding], list[Finding]]:
    """Run the certificate and, unless silent, print its tables."""
    from outpace.laws.certificate import CASES, certify, certify_broken

    tell(f"certificate: enumerating {len(CASES)} cases on {models} pair{'s' if models > 1 else ''} of toy models each")
    findings = certify(models=models)
    broken = certify_broken(models=models)
    if silent:
        return findings, broken
    on = console()
    on.print(table(("rule and draft", "outcomes", "distance", "exact"), [_row(f, "yes", "NO") for f in findings]))
    on.print(table(("rule with a mistake", "outcomes", "distance", "caught"), [_row(f, "yes", "NO") for f in broken]))
    on.print(
        f"certificate: {sum(f.holds for f in findings)} of {len(findings)} cases exact (largest distance "
        f"{max(f.distance for f in findings):.1e}), {sum(f.holds for f in broken)} of {len(broken)} mistakes caught "
        f"(smallest distance {min(f.distance for f in broken):.1e}), {sum(f.outcomes for f in findings)} outcomes\n"
    )
    return findings, broken


def _row(finding: Finding, good: str, bad: str) -> list[str]:
    return [finding.name, str(finding.outcomes), f"{finding.distance:.1e}", good if finding.holds else bad]


def _audit(target: Target, drafters: list[str], settings: Any, *, silent: bool) -> list[AuditReport]:
    """Audit each drafter at each temperature and, unless silent, print what was found."""
    from outpace.cli.prompts import SAMPLES
    from outpace.engine import Auditor
    from outpace.engine.audit import summary

    prompts = [sample.text for sample in SAMPLES]
    on = console()
    reports = []
    for temperature in TEMPERATURES:
        auditor = Auditor(target, settings, prompts=prompts, temperature=temperature)
        for drafter in drafters:
            tell(f"audit: {drafter} at temperature {temperature:g} on {len(prompts)} prompts")
            report = auditor.run(drafter)
            reports.append(report)
            if not silent:
                _show(report, on, target)
        if not silent:
            counts = summary(auditor.control)
            on.print(
                f"control, temperature {temperature:g}: plain decoding at {auditor.control_rows} rows a pass against "
                f"plain decoding: {counts['equal']} of {counts['prompts']} equal, {counts['near tie']} near ties, "
                f"{counts['differs']} beyond\n"
            )
    return reports


def _show(report: AuditReport, on: Any, target: Target) -> None:
    from outpace.cli.prompts import SAMPLES

    tokenizer = target.tokenizer
    decode = None if tokenizer is None else (lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False))
    for finding in report.findings:
        on.print(
            f"{report.drafter}, temperature {report.temperature:g}, {SAMPLES[finding.prompt].kind}: "
            f"{finding.verdict}: {verdict(finding, decode)}"
        )
    on.print(f"  emitted_per_round {report.stats.emitted_per_round:.2f} over {report.stats.rounds} rounds")
