"""The card of an audit's cleaned set, in the hub's format."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from softpref.auditing.export import CLEANED, EXPORTS, DroppedRows
from softpref.auditing.summary import Summary, evidence_skill
from softpref.markup import for_markdown, pipes, shortened
from softpref.statistics.noise_rate import rate_text


def data_card(
    summary: Summary,
    sources: Sequence[str],
    clean: str,
    model: str,
    export: str,
    dropped: DroppedRows,
) -> str:
    """Return the card: counts, method, the share of wrong labels with its interval, warnings.

    Args:
        summary: the audit's summary.
        sources: the audited files; the card names these and the next two without their folders.
        clean: the file of trusted pairs, or their number.
        model: that scored the pairs.
        export: how suspects were treated, one of `EXPORTS`.
        dropped: the rows that are not in the cleaned set.
    """
    names = ", ".join(_named(source) for source in sources)
    signals = ", ".join(f"`{for_markdown(_named(name))}`" for name in summary.signals)
    noise = rate_text(summary.noise_rate, summary.noise_rate_low, summary.noise_rate_high)
    rows = [
        ("", ""),
        ("rows of the data", f"{dropped.rows:,}"),
        ("rows here", _kept_rows(dropped)),
        ("audited pairs", f"{summary.pairs:,}"),
        ("trusted pairs", f"{summary.clean_pairs:,} ({summary.clean_provenance})"),
        ("wrong labels among the audited pairs", noise),
        *(
            (
                f"of the {of.pairs:,} from {_named(of.source)}",
                rate_text(of.noise_rate, of.noise_rate_low, of.noise_rate_high),
            )
            for of in summary.sources
        ),
        ("suspect, more likely wrong than right", f"{summary.suspect:,}"),
        ("evidence", evidence_skill(summary)),
    ]
    warnings = "".join(f"- {for_markdown(text)}\n" for text in summary.warnings) or "None.\n"
    for path in (*sources, clean):
        warnings = warnings.replace(for_markdown(path), for_markdown(_named(path)))
    return f"""---
configs:
- config_name: default
  data_files: {CLEANED}
tags: [softpref, preference, label-noise]
---

# {for_markdown(names)}, audited for wrong labels

Made by softpref {version("softpref")}: `softpref audit` with the signals
{signals}, read by `{_named(model)}`.

{pipes(rows)}
{EXPORTS[export]}.
`labels.jsonl` holds each label's probability and evidence, `summary.json` all numbers.

## Warnings

{warnings}"""


def _kept_rows(dropped: DroppedRows) -> str:
    reasons = [f"{count} {why}" for why, count in dropped.why.items() if count]
    reasons += [f"{len(dropped.unused)} not usable"] if dropped.unused else []
    count = dropped.why.total() + len(dropped.unused)
    why = f" ({', '.join(reasons)})" if reasons else ""
    return f"{dropped.rows - count:,}; {count:,} are dropped{why}"


def _named(source: str) -> str:
    return shortened(Path(source).name)
