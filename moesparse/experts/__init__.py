"""Which experts stay, the others cut out, and those that stay re-solved."""
