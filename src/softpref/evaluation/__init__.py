"""From an aligned model to numbers with intervals."""
