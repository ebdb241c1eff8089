"""Look-ups of trained tables: parameters stored in fewer bits, and whole collections as one torch op."""
