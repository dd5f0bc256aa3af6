"""What is written for others: the saved model and its card."""
