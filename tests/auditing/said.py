"""What an audit says of a set, for tests of its report."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Said:
    """As much of a summary as the report reads."""

    pairs: int = 1200
    noise_rate: float | None = 0.2
    noise_rate_low: float = 0.15
    noise_rate_high: float = 0.25
    suspect: int = 80
    unsure: int = 40
    evidence_speaks: bool = True
    clean_provenance: str = "given as a file"
    trusted_auroc: float = 0.812
    length_auroc: float = 0.7
    reliability: list = field(default_factory=lambda: [{"stated": 0.1, "right": 0.2, "pairs": 3}])
    warnings: list = field(default_factory=list)
    sources: list = field(default_factory=list)
