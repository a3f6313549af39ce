"""A gate run's results: an HTML page with plots, JSON, and a terminal's tables."""
