"""The data card of a recipe's pairs: a page of Markdown with what a user of them has to know."""

import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltapref_jax.analysis import effects as fx
from deltapref_jax.analysis import judges
from deltapref_jax.analysis import statistics as st
from deltapref_jax.analysis.findings import DOMAIN_WORDS, MARK, points, words
from deltapref_jax.analysis.page import JudgeAudit, JudgeSummary, Summary
from deltapref_jax.analysis.proposal import ARM, Proposal, cell, table
from deltapref_jax.analysis.study import Study, columns
from deltapref_jax.analysis.summary import generator_delta, plain, strata
from deltapref_jax.config import Arm, Generator, Prompts, Run, model_of
from deltapref_jax.display import COUNTS

_QUANTILES = (0, 25, 50, 75, 100)


def data_card(
    study: Study, summary: Summary, proposal: Proposal, licences: Mapping[str, str], key: str
) -> str:
    """The page as Markdown.

    Args:
      study: of the config whose one arm is the proposal's, without a student.
      summary: of `summary.summarise`.
      proposal: why these pairs.
      licences: by path of a model, as its own files state them.
      key: of the card's artifact, which hashes the config and everything that it was made from.
    """
    e, arm = study.experiment, study.experiment.arms[0]
    pairs = study.pairs_of(ARM).num_rows
    parts = [
        f"# {pairs:,} preference pairs: {cell(e.name)}",
        "",
        f"Columns are TRL's: `prompt`, `chosen` and `rejected` are lists of messages; beside them "
        f"are the generators' names, the sum of the judge's ratings, and whether the answers are "
        f"right. The chosen traces were written by {cell(arm.chosen)}, the rejected ones by "
        f"{cell(arm.rejected)}. No student was trained on these pairs, so whether they help one "
        "was not measured.",
        *_section("Why these pairs", _why(study, summary, proposal)),
        *_section("Evidence", proposal.evidence),
        *_section("Counts", _counts(study)),
        *_section("Generator delta", _generator_delta(study, arm)),
        *_section("Sample delta", _sample_delta(study)),
        *_section("Correctness", _correctness(study)),
        *_section("Judges", _judges(summary)),
        *_section("Models", _models(study, licences)),
        *_section("Prompts", _prompts(study)),
        *_section("How to make them again", _again(study, arm, key)),
    ]
    return "\n".join(parts) + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines]


def _why(study: Study, summary: Summary, proposal: Proposal) -> list[str]:
    counts = study.pair_counts[ARM][0]
    doubt = judges.doubt(study.experiment, study.experiment.arms[0], summary.judges)
    lines = [
        f"- Generators: {cell(proposal.generators.why)}. The widest of several measured gaps is on "
        "average a little wider than it really is.",
        f"- Selection: {cell(proposal.selection.why)}.",
        f"- Budget: {cell(proposal.budget)}.",
    ]
    if doubt:
        lines.append(f"- {MARK} The judge is below the bar or not measured: {cell(doubt)}.")
    if counts["tied_at_cut"]:
        lines.append(
            f"- Ties: {counts['tied_at_cut']:,.0f} of {counts['pool']:,.0f} pairs of the pool are "
            "rated as the last one kept is; which of them are kept was drawn by the seed."
        )
    return lines


def _counts(study: Study) -> list[str]:
    """From what the sources hold to the pairs; what was dropped is counted where it was."""
    always = {
        "prompts": {"read": "rows read", "rows": "prompts"},
        "sample": {"rows": "traces"},
        "pair": {"prompts": "prompts", "pool": "pairs in the pool", "kept": "pairs kept"},
    }
    rows = []
    for record in study.artifacts:
        every = always.get(record.stage, {}) if record.label[:5] != "suite" else {}
        rows += [
            (cell(record.label), what, f"{record.stats[name]:,.0f}")
            for name, what in (COUNTS.get(record.stage, {}) | every).items()
            if name in every or record.stats.get(name)
        ]
    return [
        *table(("artifact", "what", "count"), rows),
        "",
        "Nothing else was dropped, cut or drawn.",
    ]


def _generator_delta(study: Study, arm: Arm) -> list[str]:
    """Accuracy of both generators and their difference, by suite and domain."""
    delta = generator_delta(study, arm)
    assert delta is not None  # all generators were evaluated
    sides = [study.capability[name] for name in (arm.rejected, arm.chosen)]
    rows: list[tuple[str, ...]] = []
    for d in study.domains:
        answers = [st.by_question(side, d) for side in sides]
        for suite, of_low in answers[0].items():
            low, high = (_of_suite(side, suite) for side in sides)
            runs = {arm.chosen: {Run(0, 0): high}}
            change = fx.effects(low, runs, d).change(arm.chosen).estimate
            accuracies = [st.suite_accuracy(a[suite]) for a in answers]
            rows.append(
                (f"{cell(suite)}, {DOMAIN_WORDS[d]}", *_accuracies(accuracies), points(change))
                + (f"{len(of_low.questions):,}",)
            )
        means = [st.accuracy(side, d) for side in sides]
        questions = sum(len(a.questions) for a in answers[0].values())
        rows.append(
            (f"mean {DOMAIN_WORDS[d]}", *_accuracies(means), points(delta[d]), f"{questions:,}")
        )
    heads = ("suite", f"{cell(arm.rejected)}, %", f"{cell(arm.chosen)}, %", "delta, points")
    return [
        "Accuracy of the two generators on the suites, each sampled in its own manner, and the "
        "paired difference, with 95% intervals over questions.",
        "",
        *table((*heads, "questions"), rows),
    ]


def _of_suite(results: pa.Table, suite: str) -> pa.Table:
    return results.filter(pc.equal(results["suite"], suite))


def _accuracies(estimates: Sequence[st.Estimate]) -> list[str]:
    return [f"{v:.1f} [{low:.1f}, {high:.1f}]" for v, low, high in estimates]


def _sample_delta(study: Study) -> list[str]:
    """Chosen minus rejected rating of the kept pairs, by judge and dimension."""
    if not study.rated:
        return ["The config has no judge, so that no sample delta was measured."]
    chosen, rejected = study.pair_rows(study.pairs_of(ARM))
    rows = []
    for judge, rated in study.rated.items():
        gaps = rated.matrix[chosen] - rated.matrix[rejected]
        by_name = {d: gaps[:, i] for i, d in enumerate(rated.dimensions)}
        for name, gap in (by_name | {"mean of these": gaps.mean(axis=1)}).items():
            quantiles = [f"{q:+.2f}" for q in np.percentile(gap, _QUANTILES)]
            above = f"{100 * np.mean(gap > 0):.0f}%"
            moments = f"{gap.mean():+.2f}", f"{gap.std():.2f}"
            rows.append((cell(judge), words(name), *moments, *quantiles, above))
    heads = ("judge", "dimension", "mean", "SD", "min", "25%", "median", "75%", "max", "above 0")
    return [
        "Chosen minus rejected rating of the pairs kept, in rating points (1 to 5).",
        "",
        *table(heads, rows),
    ]


def _correctness(study: Study) -> list[str]:
    shares = strata(study, ARM)
    if shares is None:
        return ["The prompts have no checker, so that no answer was verified."]
    rows = [(words(name).replace(" ", " / "), f"{share:.1f}%") for name, share in shares.items()]
    return table(("chosen / rejected", "share of the pairs"), rows)


def _judges(s: Summary) -> list[str]:
    """The numbers of the page's judge cards."""
    if not s.judges:
        return ["The config has no judge."]
    heads = ("judge", "kind", "traces", "AUC, right above wrong", "halo", "rank corr. with length")
    lines = table((*heads, "pairs tied at the cut"), [(*_judge(j), _ties(j)) for j in s.judges])
    measures = ("AUC, corrupted solutions", "AUC, edited traces", "reliability", "gaps with truth")
    rows = [(cell(j.name), words(d), *_measured(j, d)) for j in s.judges for d in j.dimensions]
    lines += [
        "",
        *table(("judge", "dimension", *measures), rows),
        "",
        "AUC: a text above its own corrupted version. Reliability: of a gap, over wordings of the "
        "rubric. Gaps with truth: rank correlation on the pairs kept. Empty: not measured.",
        "",
        *(f"- {cell(sentence)}" for sentence in s.judge_sentences),
    ]
    lines += [
        f"- {cell(a.first)} and {cell(a.second)}: rank correlation {a.spearman:.2f} over "
        f"{a.traces:,} traces; {a.alike:.0%} of the pairs ordered alike."
        for a in s.agreement
    ]
    return lines


def _judge(j: JudgeSummary) -> tuple[str, ...]:
    value, low, high = j.auc_correct
    auc = f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return cell(j.name), j.kind, f"{j.traces:,}", auc, f"{j.halo:.2f}", f"{j.length:+.2f}"


def _measured(j: JudgeSummary, dimension: str) -> tuple[str, ...]:
    """What is known of a judge in one dimension."""
    pairs = next((p for p in j.on_pairs if p.arm == ARM), None)
    reliability = j.reliability.get(dimension)
    gaps = pairs.dimensions.get(dimension, math.nan) if pairs else math.nan
    return (
        _auc(j.audit, dimension),
        _auc(j.edited, dimension),
        f"{reliability.one:.2f}" if reliability else "",
        "" if math.isnan(gaps) else f"{gaps:+.2f}",
    )


def _auc(audit: JudgeAudit | None, dimension: str) -> str:
    if audit is None or dimension not in audit.auc:
        return ""
    value, low, high = audit.auc[dimension]
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _ties(j: JudgeSummary) -> str:
    """The most of any draw of the arm's pairs; "" where none was ranked by this judge."""
    tied = [p.tied for p in j.on_pairs if p.arm == ARM and p.tied is not None]
    return f"{tied[0]:,}" if tied else ""


def _models(study: Study, licences: Mapping[str, str]) -> list[str]:
    """Generators and judges, with the weights that were used and their licences."""
    e, arm = study.experiment, study.experiment.arms[0]
    used = [g for g in e.generators if g.name in (arm.chosen, arm.rejected)]
    named = [(f"generator {g.name}", model_of(e, g.model), _manner(g)) for g in used]
    named += [(f"judge {j.name}", model_of(e, j.model), "") for j in e.judges if j.kind == "model"]
    rows = [
        (cell(what), cell(m.place), m.dtype, m.quantization, manner, cell(licences[m.place]))
        for what, m, manner in named
    ]
    heads = ("model", "path", "dtype", "quantised", "sampled", "licence, as its files state it")
    return table(heads, rows)


def _manner(g: Generator) -> str:
    manner = {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k}
    asked = {"system": g.system, "prefix": g.prefix}
    said = [f"{name} {cell(json.dumps(text))}" for name, text in asked.items() if text]
    return ", ".join([*(f"{name} {value:g}" for name, value in manner.items()), *said])


def _prompts(study: Study) -> list[str]:
    rows = [
        (p.kind, cell(_source(p)), f"{p.count:,}" if p.count else "all", _checker(p), p.seed)
        for p in study.experiment.prompts
    ]
    lines = table(("kind", "source", "asked for", "checker", "seed"), rows)
    tasks, counts = np.unique(columns(study.prompts, "task")[0].astype(str), return_counts=True)
    shares = ", ".join(f"{cell(t)} {n:,}" for t, n in zip(tasks, counts, strict=True))
    apart = "They share no question, and no 13 words in a row, with a suite."
    return [*lines, "", f"Distinct prompts that were answered: {shares}. {apart}"]


def _checker(p: Prompts) -> str:
    return p.checker or (f"that of {p.kind}" if p.tasks else "none")


def _source(p: Prompts) -> str:
    if p.tasks:
        level = f"; difficulty {p.difficulty}" if p.kind == "synthetic" else ""
        return f"{', '.join(p.tasks)}{level}"
    at = f"@{p.revision}" if p.revision else ""
    subset = f", {p.name}" if p.name else ""
    split = f", split {p.split}" if p.kind in ("hub", "tfds") else ""
    return f"{p.path}{at}{subset}{split}, column {p.prompt_field}"


def _again(study: Study, arm: Arm, key: str) -> list[str]:
    """What a later study has to say to train on the pairs, and what they were made from."""
    defaults = plain(Arm())
    said = {k: v for k, v in plain(arm).items() if v != defaults[k]}
    fields = ", ".join(f"{name}={value!r}" for name, value in said.items())
    counts = [p.count for p in study.experiment.prompts]
    artifacts = [
        (cell(record.label), f"`{record.stage}/{record.key}`") for record in study.artifacts
    ]
    return [
        f"A study of the same config with `prompts` of the counts {counts} and the arm",
        "",
        f"    Arm({fields})",
        "",
        "trains on these pairs, and makes no trace and no rating again, if its other arms are of "
        "the same two generators or `shared_by` names them. The seed of traces and draws is "
        f"{study.experiment.seed}.",
        "",
        *table(("artifact", "folder"), [*artifacts, ("this card", f"`recipe/{key}`")]),
        "",
        "The name of a folder is a hash of its config and of the contents of its inputs. "
        f"Libraries: {', '.join(f'{name} {version}' for name, version in study.versions.items())}.",
    ]
