"""Calibration, noise rates, evidence and intervals, of any score; nothing here knows a model."""
