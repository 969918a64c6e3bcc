"""A synthetic language with a known right answer, for the demo, tests and studies."""
