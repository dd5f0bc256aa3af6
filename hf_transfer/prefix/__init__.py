"""Runs the frozen prefix (the layers before a cut) once over the images, and stores and reads its activations."""
