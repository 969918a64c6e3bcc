"""`report.html`: an audit on one page that needs no network.

The content policy allows the page's own script alone, by its hash. Texts reach the script as JSON
and become text nodes, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from random import Random
from string import Template
from typing import Any

from datasets import Dataset

from softpref.auditing.beliefs import SUSPECT, UNSURE
from softpref.auditing.charts import bars, histogram, reliability_curve
from softpref.auditing.explanations import NO_EVIDENCE, kind_name
from softpref.auditing.pair_rows import label_key, worse_first
from softpref.auditing.summary import Summary, annotator_lines, evidence_skill
from softpref.data.messages import as_text
from softpref.data.readers import column, dataset_rows
from softpref.data.splits import ASSUMED_CORRECT
from softpref.markup import for_html
from softpref.statistics.noise_rate import KNOWN, bounds
from softpref.training.output import write_text

REPORT = "report.html"
FULL_TEXTS = 5000
MAX_LISTED = 50_000  # larger pages are slow in a browser
SAMPLE = 150
PREVIEW = 80


def write_report(
    path: Path,
    rows: Dataset,
    pairs: Dataset,
    summary: Summary,
    about: Mapping[str, str],
    fingerprint: str,
    seed: int,
) -> None:
    """Write the page.

    The 5,000 most suspect pairs and the random sample have their full texts, the next 45,000 have
    previews of 80 characters. The remaining pairs of larger sets are only in `labels.jsonl`.

    Args:
        path: the file.
        rows: an audit's rows.
        pairs: the same pairs with `prompt`, `chosen` and `rejected`, in the same order.
        summary: the audit's `Summary`.
        about: what the page's first lines name, such as the data and the model.
        fingerprint: of the data; the key under which the browser stores marks.
        seed: of the random sample.
    """
    page = files("softpref.auditing")
    style, script, frame = (
        (page / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    data = page_data(rows, pairs, fingerprint, seed)
    data["speaks"] = summary.evidence_speaks
    warnings = "".join(f'<p class="warning">{for_html(text)}</p>' for text in summary.warnings)
    lines = [*map(str, summary.sources), *annotator_lines(summary)]
    sources = "".join(f"<p>{for_html(text[0].upper() + text[1:])}.</p>" for text in lines)
    write_text(
        path,
        Template(frame).substitute(
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            about="".join(
                f"<div><dt>{for_html(name)}</dt> <dd>{for_html(text)}</dd></div>"
                for name, text in about.items()
            ),
            headline=for_html(headline(summary)),
            warnings=sources + warnings,
            charts="\n".join(charts(rows, summary)),
            data=_script_safe_json(data),
        ),
    )


def charts(rows: Dataset, summary: Summary) -> list[str]:
    """Return the charts, or none if evidence is uninformative."""
    if not summary.evidence_speaks:
        return []
    found = column(rows, "evidence").combine_chunks()
    evidence = {field.name: found.field(field.name).to_numpy() for field in found.type}
    return [
        histogram(
            sum(evidence.values()),
            0,
            "Evidence of the pairs, nats",
            "Left of 0, evidence speaks against the label; right of it, for the label.",
        ),
        bars(
            {kind_name(kind): float(abs(nats).mean()) for kind, nats in evidence.items()},
            "Evidence by kind, nats",
            "How much each kind speaks for or against a label: the mean absolute value over pairs.",
        ),
        histogram(
            column(rows, "p_correct").to_numpy(),
            SUSPECT,
            "Probability that the label is right",
            f"The suspects are left of {SUSPECT:g}.",
            (0, 1),
        ),
        reliability_curve(
            summary.reliability,
            "Calibration of the probabilities",
            "The share of right labels (up) among trusted pairs, as given and swapped, by their "
            "stated probability (across), in cross-validation; the line is perfect calibration.",
        ),
    ]


def headline(summary: Summary) -> str:
    """Return a short answer: how many labels are wrong, how sure that is, what to do next."""
    low, high = summary.noise_rate_low, summary.noise_rate_high
    if not summary.evidence_speaks:
        return (
            f"Unknown for these {summary.pairs:,} labels: {evidence_skill(summary)}. "
            "Check the trusted pairs, add more of them, or try another model."
        )
    if high - low > KNOWN:
        how_many = f"How many of the {summary.pairs:,} labels are wrong is unknown."
        what = "Before you act, try the model that you will align, or add more trusted pairs."
    else:
        of_all = f"of the {summary.pairs:,} labels are wrong"
        how_many = f"{bounds(low, high)} {of_all}, with 95% confidence.".capitalize()
        if summary.noise_rate is not None:
            how_many = (
                f"About {summary.noise_rate:.0%} {of_all}, between {low:.0%} and {high:.0%} with "
                "95% confidence."
            )
        if summary.clean_provenance == ASSUMED_CORRECT:
            how_many = f"If the trusted pairs, which were not reviewed, are right: {how_many}"
        what = "Review the random sample below to make a clean set."
        if summary.suspect:
            what += " Then review the most suspect pairs."
    found = (
        f"{summary.suspect:,} are suspect, more likely wrong than right, and {summary.unsure:,} "
        f"more are below {UNSURE:.0%}."
    )
    if not summary.suspect:
        found = (
            "No single label is more likely wrong than right, so the wrong ones cannot be "
            f"named; {summary.unsure:,} are below {UNSURE:.0%}."
        )
    return f"{how_many} {found} {what} Evidence: {evidence_skill(summary)}."


def page_data(rows: Dataset, pairs: Dataset, fingerprint: str, seed: int) -> dict[str, Any]:
    """Return the data of the page's script: pairs by rank, the sample's indices and originals.

    `worse_first` is drawn for every pair of the sample, which is shown without its labels.
    """
    order = column(rows, "rank").to_numpy().argsort()
    sample = Random(seed).sample(range(len(order)), min(SAMPLE, len(order)))
    listed = sorted({*range(min(MAX_LISTED, len(order))), *sample})
    entries, labels = [], []
    originals = {}
    selected = (dataset_rows(dataset.select(order[listed])) for dataset in (rows, pairs))
    for place, row, texts in zip(listed, *selected, strict=True):
        labels.append(label_key(texts))
        shown = [as_text(texts[name]) for name in ("prompt", "chosen", "rejected")]
        nats = sum(row["evidence"].values())
        numbers = [row["uid"], round(row["p_correct"], 4), round(nats, 3), row["flag"]]
        if place < FULL_TEXTS or place in sample:
            entries.append([*numbers, *shown, row["rank"], _why(row)])
        else:
            entries.append([*numbers, *map(_preview, shown), row["rank"]])
        if place in sample:
            responses = [texts["chosen"], texts["rejected"]]
            originals[row["uid"]] = {
                "prompt": texts["prompt"],
                "responses": responses,
                "worse_first": worse_first(fingerprint, row["uid"]),
            }
    return {
        "fingerprint": fingerprint,
        "pairs": entries,
        "labels": labels,
        "total": len(order),
        "sample": [listed.index(place) for place in sample],
        "originals": originals,
    }


def _why(row: dict[str, Any]) -> str:
    """Return what is known about one pair; that nothing is known stands in the headline."""
    reason = row["why"].removeprefix(NO_EVIDENCE).removeprefix("; ")
    source = f"from {row['source']}" if "source" in row else ""
    return "; ".join(filter(None, (reason, source)))


def _preview(text: str) -> str:
    return text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"


def _script_safe_json(data: Any) -> str:
    """Return JSON that a browser cannot parse as markup, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
