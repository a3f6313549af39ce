"""What a gate run shows: one HTML page with its plots, the same as JSON, and a terminal's tables."""
