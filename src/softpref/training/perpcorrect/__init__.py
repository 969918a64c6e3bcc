"""PerpCorrect as its authors' repository has it."""
