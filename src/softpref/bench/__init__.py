"""`softpref bench`: what a training step costs beside TRL's."""
