"""The only place that prints: answers to stdout; progress, notes and errors to stderr."""
