"""Whole experiments, from a world or files to a report."""
