"""What only a clone reports."""
