"""The frozen prefix: run once over the images, stored, and read from there."""
