"""Predictions and evaluation of saved models."""
