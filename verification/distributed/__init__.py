"""Steps over several ranks: what they are asked, how ranks are run, and what must hold."""
