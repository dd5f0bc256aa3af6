"""Prediction with saved models, and evaluation of saved models."""
