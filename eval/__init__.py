"""Evaluation: loss, cache memory and decode speed of trained models; reads checkpoints, writes records and results."""
