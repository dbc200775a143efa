"""A call: its arguments, what they are checked and resolved to, what it would do and cost, and its outcome."""
