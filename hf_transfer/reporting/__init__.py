"""What a run leaves for its reader: results.json and report.html."""
