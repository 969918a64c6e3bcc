"""From pairs and a model to an aligned model."""
