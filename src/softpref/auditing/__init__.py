"""Which labels of a preference set are wrong: scores, probabilities, reasons, cleaned data."""
