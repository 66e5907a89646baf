"""Other packages' interfaces, so that a user of theirs changes one import."""
