"""The margins' Jacobian: how a step gets gradients of single pairs without a pass for each."""
