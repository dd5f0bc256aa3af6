"""Saves a trained model in Hub layout, with a model card, and pushes the saved model to the Hub."""
