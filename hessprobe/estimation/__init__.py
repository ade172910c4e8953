"""Numbers from matrices known only by their action, each with a standard error."""
