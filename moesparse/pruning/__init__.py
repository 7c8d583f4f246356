"""A recipe carried out: experts removed, weights pruned, and the report of both."""
