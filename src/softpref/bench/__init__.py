"""`softpref bench`: cost of a training step compared with TRL's."""
