"""Predicts labels with saved models, and evaluates saved models."""
