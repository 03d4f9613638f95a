"""Programs for working on this package that measure nothing."""
