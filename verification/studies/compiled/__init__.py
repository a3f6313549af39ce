"""Every launch compiled for GPUs that are not here, and what the machine code shows."""
