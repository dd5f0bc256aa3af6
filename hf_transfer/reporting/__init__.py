"""What a run reports about itself: its results as JSON, and the page and charts made from them."""
