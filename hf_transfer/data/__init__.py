"""From labelled images, wherever they lie, to checked splits of RGB pictures."""
