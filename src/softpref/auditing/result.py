"""An audit's result: the pairs' beliefs, the numbers of the set, and how both show themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from softpref.auditing.export import TrustedLabels
from softpref.auditing.summary import Summary
from softpref.data.bad_rows import BadRow
from softpref.markup import for_html
from softpref.statistics.noise_rate import rate_text


@dataclass(frozen=True)
class Audit:
    """An audit's result.

    Attributes:
        pairs: one row per pair, in the order of the data: `uid`, `row`, `source` (with several
            files), `ppl_diff` (nats per token), `soft_label`, `margin` (nats) and `step` (null
            without a run), `p_correct`, `rank` (1: most suspect), `evidence` (for the label, nats,
            by kind), `flag` (`suspect`, `unsure`, `fine`), `why`.
        summary: numbers about the whole set.
        texts: prompts and responses of the same pairs.
        trusted: the labels of the trusted pairs.
        fingerprint: fingerprint of the data.
        unused: rows of the data that could not be used, with reasons.
        ties: source and row of the ties, which have no label to be wrong.
        report: the page that was written, if any.
    """

    pairs: Dataset
    summary: Summary
    texts: Dataset
    trusted: TrustedLabels
    fingerprint: str
    unused: tuple[BadRow, ...]
    ties: frozenset[tuple[str, int]] = frozenset()
    report: Path | None = None

    def __repr__(self) -> str:
        facts = "; ".join(f"{name} {value}" for name, value in self._facts().items())
        return f"<Audit of {self.summary.pairs:,} pairs: {facts}>"

    def _repr_html_(self) -> str:
        rows = self._facts()
        if self.report:
            rows.pop("report")
        cells = [(name, for_html(value)) for name, value in rows.items()]
        if self.report:
            address = for_html(self.report.absolute().as_uri())
            cells.append(("report", f'<a href="{address}">{for_html(str(self.report))}</a>'))
        warnings = "".join(f"<li>{for_html(text)}</li>" for text in self.summary.warnings)
        body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
        head = f"<caption>Audit of {self.summary.pairs:,} pairs</caption>"
        return f"<table>{head}{body}</table>" + (f"<ul>{warnings}</ul>" if warnings else "")

    def _facts(self) -> dict[str, str]:
        summary = self.summary
        rate = rate_text(summary.noise_rate, summary.noise_rate_low, summary.noise_rate_high)
        found = f"{summary.suspect:,} ({summary.unsure:,} more unsure)"
        if not summary.evidence_speaks:
            found = "none named, no signal distinguishes right labels from wrong ones"
        facts = {"wrong labels": rate, "suspects": found}
        return facts | ({"report": str(self.report)} if self.report else {})
