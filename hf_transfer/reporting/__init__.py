"""Reports a run: its results as JSON, its page as HTML, and its charts as SVG."""
