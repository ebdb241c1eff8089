"""Pure integer functions from a logical id to the slots that store its row. No parameters, no gradient."""
