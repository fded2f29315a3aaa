"""One module a stage of the line; each has run(context)."""
