"""`report.html`: an audit on one page, without a network.

The page runs no script but its own: its content policy names that script's hash. Texts reach it as
JSON and are put into the page as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from random import Random
from string import Template
from typing import Any

from datasets import Dataset

from softpref.auditing.beliefs import UNSURE
from softpref.auditing.charts import bars, histogram, reliability_curve
from softpref.auditing.explanations import words_of
from softpref.auditing.summary import Summary, how_far
from softpref.data.messages import as_text
from softpref.data.readers import column, dataset_rows
from softpref.markup import for_html
from softpref.statistics.noise_rate import KNOWN, bounds
from softpref.training.output import write_text

REPORT = "report.html"
WHOLE_TEXTS = 5000
LISTED = 50_000  # a browser holds no more at ease
SAMPLE = 150
PREVIEW = 80


def write_report(
    path: Path, rows: Dataset, pairs: Dataset, summary: Summary, fingerprint: str, seed: int
) -> None:
    """Write the page.

    The 5,000 most suspect pairs and the random sample carry their whole texts, the 45,000 after
    them previews of 80 characters; of larger sets the rest is in `labels.jsonl` alone.

    Args:
        path: the file.
        rows: an audit's rows.
        pairs: the same pairs with `prompt`, `chosen` and `rejected`, in the same order.
        summary: the audit's `Summary`.
        fingerprint: of the data; the browser keeps marks under it.
        seed: of the random sample.
    """
    page = files("softpref.auditing")
    style, script, frame = (
        (page / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html")
    )
    data = page_data(rows, pairs, fingerprint, seed)
    warnings = "".join(f'<p class="warning">{for_html(words)}</p>' for words in summary.warnings)
    by_source = [str(of).replace("wrong", "Wrong", 1) for of in summary.sources]
    sources = "".join(f"<p>{for_html(words)}.</p>" for words in by_source)
    write_text(
        path,
        Template(frame).substitute(
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            headline=for_html(headline(summary)),
            warnings=sources + warnings,
            charts="\n".join(charts(rows, summary)),
            data=_inert(data),
        ),
    )


def charts(rows: Dataset, summary: Summary) -> list[str]:
    """Return the figures; none where evidence does not speak, for they would show nothing."""
    if not summary.evidence_speaks:
        return []
    found = column(rows, "evidence").combine_chunks()
    evidence = {field.name: found.field(field.name).to_numpy() for field in found.type}
    return [
        histogram(
            sum(evidence.values()),
            "Evidence of the pairs, nats",
            "Left of 0 it speaks against the label, right of it for the label.",
        ),
        bars(
            {words_of(kind): float(abs(nats).mean()) for kind, nats in evidence.items()},
            "What the evidence comes from, nats",
            "How much each kind speaks for or against a label, the mean of all pairs.",
        ),
        histogram(
            column(rows, "p_correct").to_numpy(),
            "Probability that the label is right",
            "Pairs at the left end are the suspects.",
        ),
        reliability_curve(
            summary.reliability,
            "How far the probabilities can be trusted",
            "Trusted pairs, as given and swapped, judged by fits that never saw them; on the line "
            "they are exact.",
        ),
    ]


def headline(summary: Summary) -> str:
    """Return the answer in few sentences: how many, how sure, what to do next."""
    low, high = summary.noise_rate_low, summary.noise_rate_high
    if not summary.evidence_speaks:
        return (
            f"Unknown for these {summary.pairs:,} labels: {how_far(summary)}. Check the trusted "
            "pairs, give more of them, or try another model."
        )
    if high - low > KNOWN:
        how_many = f"How many of the {summary.pairs:,} labels are wrong is unknown."
        what = "Try the model that you will align, or more trusted pairs, before you act."
    else:
        of_all = f"of the {summary.pairs:,} labels are wrong"
        how_many = f"{bounds(low, high)} {of_all}, with 95% confidence.".capitalize()
        if summary.noise_rate is not None:
            how_many = (
                f"About {summary.noise_rate:.0%} {of_all}, between {low:.0%} and {high:.0%} with "
                "95% confidence."
            )
        what = "Review the random sample below: that makes a clean set."
        if summary.suspect:
            what += " Then look at the first of the suspects."
    found = (
        f"{summary.suspect:,} are suspect, more likely wrong than right, and {summary.unsure:,} "
        f"more are below {UNSURE:.0%}."
    )
    if not summary.suspect:
        found = (
            "No single label is more likely wrong than right, so which ones are wrong is not "
            f"known; {summary.unsure:,} are below {UNSURE:.0%}."
        )
    return f"{how_many} {found} {what} Evidence: {how_far(summary)}."


def page_data(rows: Dataset, pairs: Dataset, fingerprint: str, seed: int) -> dict[str, Any]:
    """Return what the page's script reads: pairs by rank, the sample's places, its originals."""
    order = column(rows, "rank").to_numpy().argsort()
    sample = Random(seed).sample(range(len(order)), min(SAMPLE, len(order)))
    listed = sorted({*range(min(LISTED, len(order))), *sample})
    entries = []
    originals = {}
    chosen = (dataset_rows(of.select(order[listed])) for of in (rows, pairs))
    for place, row, texts in zip(listed, *chosen, strict=True):
        words = [as_text(texts[name]) for name in ("prompt", "chosen", "rejected")]
        nats = sum(row["evidence"].values())
        is_whole = place < WHOLE_TEXTS or place in sample
        entries.append([
            row["uid"], round(row["p_correct"], 4), round(nats, 3), row["flag"],
            *(words if is_whole else map(_preview, words)), row["rank"],
            *([_why(row)] if is_whole else []),
        ])  # fmt: skip
        if place in sample:
            responses = [texts["chosen"], texts["rejected"]]
            originals[row["uid"]] = {"prompt": texts["prompt"], "responses": responses}
    return {
        "fingerprint": fingerprint,
        "pairs": entries,
        "total": len(order),
        "sample": [listed.index(place) for place in sample],
        "originals": originals,
    }


def _why(row: dict[str, Any]) -> str:
    return f"{row['why']}; from {row['source']}" if "source" in row else row["why"]


def _preview(text: str) -> str:
    return text if len(text) <= PREVIEW else text[: PREVIEW - 1] + "…"


def _inert(data: Any) -> str:
    """Return JSON that no browser takes for markup, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for mark in "<>&\u2028\u2029":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
