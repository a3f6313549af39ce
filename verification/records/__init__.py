"""Records of what was seen, and of which sources and versions: the only writer of evidence."""
