"""From text to batches: sources, noise, tokens, batches."""
