"""Align language models on preference pairs whose labels cannot be trusted."""
