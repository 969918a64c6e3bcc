"""Generate responses, judge them in pairs, and estimate win rates."""
