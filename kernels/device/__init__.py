"""Code that runs on the GPU, with its launchers and its table of tilings."""
