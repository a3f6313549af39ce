"""Is the gate of steps right? Honest training steps on several ranks, and mistakes planted in them."""
