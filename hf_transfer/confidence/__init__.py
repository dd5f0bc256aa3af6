"""Honest confidence: temperatures, conformal sets, abstention, and the distance to the training images."""
