"""Error messages, files, and questions about any torch distribution."""
