"""Saving a trained model in Hub layout, with its card, and pushing it to the Hub."""
