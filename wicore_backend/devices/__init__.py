"""Cards, what they hold, and ready-made settings. Knows the engine's arithmetic; the engine does not know it."""
