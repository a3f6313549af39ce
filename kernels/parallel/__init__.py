"""Several GPUs: experts in parallel, saving and loading over any number of ranks, and what each rank holds."""
