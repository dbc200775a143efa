"""A call and its plan: arguments, checks, what it would do and cost, and its outcome."""
