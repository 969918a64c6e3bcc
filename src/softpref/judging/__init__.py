"""Who answers better: responses, pairwise verdicts, and win rates that can be believed."""
