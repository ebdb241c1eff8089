"""From a byte budget to a method and its settings per table."""
