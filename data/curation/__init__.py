"""Raw problem rows to a clean set: pure filters, each in a file of its own (see docs/data.md)."""
