"""Reference tasks: one network family, its data and its metric per file."""
