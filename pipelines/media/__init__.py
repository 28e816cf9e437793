"""Reading and writing videos, charts and contact sheets."""
