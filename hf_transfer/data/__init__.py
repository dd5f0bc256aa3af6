"""Loads labeled images from folders, tables, the Hub or memory, as checked train, validation and test splits."""
